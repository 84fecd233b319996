"""Kamera's patches over what could break them: a low rank, a move, another order, edits in front.

Each point is held against the full prefill of its own prompt and against naive reuse there. Where a
patch was made for something else it is forced on the prompt: the strategy itself refuses it, and of
how many tokens is reported beside. Recovery is `1 - mean KL(patched) / mean KL(naive)`; below zero
a patch does harm. Questions play no part in how a patch is made.

    rank      patches of a rank, where they were made for
    moved     ... with so many tokens of other text put in front of all
    order     the passages in front reversed: patches of the first order, of that one, an orbit's
    stale     the first passages replaced by others, which have patches for where they are: also
              against refusing those that are stale, and against fresh ones for all
"""

import argparse
import dataclasses
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from kvjax.benchmarks import divergence, engine_manifest, intervals, manifest
from kvjax.benchmarks.corpora import Corpus, Item, Passage, build
from kvjax.benchmarks.results import VERSION, write_json
from kvjax.branch import Branch
from kvjax.cache.chunks import Variant
from kvjax.llm import LLM
from kvjax.request import Chunk, SamplingParams
from kvjax.reuse.kamera import Kamera, antecedents
from kvjax.reuse.strategy import KVPatch, Prompt

ANSWER = SamplingParams(temperature=0, min_tokens=8, max_tokens=16)
Point = tuple[str, Any]  # curve, and where on it


@dataclasses.dataclass(frozen=True)
class Forced(Kamera):
    """Adds the first patch that a chunk was given, whatever that was made for."""

    name: ClassVar[str] = "kamera_forced"

    def patch_of(self, variant: Variant, prompt: Prompt, number: int) -> KVPatch | None:
        """The oldest."""
        if antecedents(prompt, number).nothing:
            return None
        patches = [fact for fact in variant.facts.values() if isinstance(fact, KVPatch)]
        return patches[0] if patches else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks kamera-curves`."""
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--corpus", default="binding", choices=("binding", "lookup"))
    parser.add_argument("--items", type=int, default=12)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rank", type=int, default=32, help="of the curves that are not of ranks")
    parser.add_argument("--moved", type=int, nargs="+", default=[0, 16, 64, 256], help="tokens")
    parser.add_argument("--stale", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="passages")
    parser.add_argument("--orbit", type=int, default=3, help="orders of an orbit's patch")
    parser.add_argument("--out", type=Path, default=Path("bench-results/kamera-curves.json"))


def run(args: argparse.Namespace) -> int:
    """Measures item by item, and writes after each."""
    if min(args.items, args.rank, args.orbit, *args.ranks) < 1 or min(*args.moved, *args.stale) < 0:
        raise ValueError("--items, --rank, --ranks, --orbit need 1; --moved, --stale 0 or more")
    about = manifest.base("kamera-curves")
    corpus = build(args.corpus)
    if args.items > len(corpus.items):
        raise ValueError(f"--items may be {len(corpus.items)} at most, got {args.items}")
    bench = Bench(args, corpus, _llm(args))
    record: dict[str, Any] = {
        "version": VERSION,
        "command": "kamera-curves",
        "status": "running",
        "manifest": {**about, "engine": bench.about(), "corpus": corpus.digest},
        "rank": args.rank,
        "readings": {},
    }
    for number, item in enumerate(corpus.items[: args.items]):
        for (curve, at), reading in bench.read(item):
            places = record["readings"].setdefault(curve, {})
            places.setdefault(str(at), []).append(reading)
        record["curves"] = summary(record["readings"])
        write_json(args.out, record)
        print(f"item {number + 1} of {args.items}: {item.id}", flush=True)
    record["status"] = "complete"
    write_json(args.out, record)
    print(table(record["curves"]), end="")
    return 0


def _llm(args: argparse.Namespace) -> LLM:
    return LLM(
        args.model, dtype=args.dtype, deterministic=True, force_reuse=True, max_num_seqs=4, seed=0
    )


class Bench:
    """One engine; every reading begins with no prefix cached."""

    def __init__(self, args: argparse.Namespace, corpus: Corpus, llm: LLM) -> None:
        self._args, self._corpus, self._llm = args, corpus, llm
        self._tokenizer = llm.get_tokenizer()

    def about(self) -> dict[str, Any]:
        """What the engine is, for the manifest."""
        return engine_manifest.of_engine(self._llm.engine, self._tokenizer)

    def read(self, item: Item) -> Iterator[tuple[Point, dict[str, float]]]:
        """All points of one item."""
        args, made = self._args, Forced(rank=self._args.rank, most=99)
        for rank in args.ranks:
            cost = self._condition(item, Kamera(rank=rank, most=99))
            yield ("rank", rank), self._compare(item, Kamera(rank=rank, most=99)) | cost
        fresh = Kamera(rank=made.rank, most=99)
        self._condition(item, fresh)
        for tokens in args.moved:
            longer = self._longer(item, tokens)
            yield ("moved", tokens), self._refused(longer) | self._compare(longer, made)
        turned = _reversed(item)
        yield ("order", "of the first"), self._refused(turned) | self._compare(turned, made)
        for count in args.stale:
            edited = self._edited(item, count)
            if count:  # what is new has its patches, and what is old keeps those of before
                new = dataclasses.replace(edited, passages=edited.passages[:count])
                self._llm.condition(new.prompt(_chunk)[:-1], strategy=fresh)
            found = self._refused(edited) | self._compare(edited, made)
            found["kl_refusing"] = self._compare(edited, fresh)["kl_patched"]
            self._llm.condition(edited.prompt(_chunk)[:-1], strategy=fresh)
            found["kl_fresh"] = self._compare(edited, fresh)["kl_patched"]
            yield ("stale", count), found
        for name, orbit, of in (("of its own", 1, turned), (f"orbit of {args.orbit}", args.orbit,
                                item)):  # fmt: skip
            self._condition(of, Kamera(rank=made.rank, most=99, orbit=orbit))
            yield ("order", name), self._compare(turned, made)

    def _condition(self, item: Item, strategy: Kamera) -> dict[str, float]:
        """Makes the patches of an item's chunks; no others are kept."""
        self._llm.engine.chunks.forget()
        self._llm.engine.chunks.patches.clear()
        self._llm.reset_prefix_cache()
        made = self._llm.condition(item.prompt(_chunk)[:-1], strategy=strategy)
        return {"patch_share": made.patch_bytes / made.kv_bytes, "made_s": made.seconds}

    def _compare(self, item: Item, strategy: Kamera) -> dict[str, float]:
        """KL to the item's own full prefill, over its greedy answer."""
        with self._open(item, None) as branch:
            answer = self._answer(branch)
            full = branch.logits(answer[:-1])
        found: dict[str, float] = {}
        for name, spec in (("naive", "naive"), ("patched", strategy)):
            with self._open(item, spec) as branch:
                kl = divergence.kl_divergence(full, branch.logits(answer[:-1]))
                found[f"kl_{name}"] = float(kl.mean())
        return found

    def _refused(self, item: Item) -> dict[str, float]:
        """Share of reused tokens that have no patch for where they are."""
        with self._open(item, Kamera(rank=self._args.rank, most=99)) as branch:
            assert branch.reuse is not None
            last = branch.reuse.groups[-1]
            return {"refused": last.shifted / (last.shifted + last.patched)}

    def _open(self, item: Item, spec: Any) -> Branch:
        self._llm.reset_prefix_cache()
        return self._llm.open(item.prompt(_chunk), SamplingParams(reuse=spec))

    def _answer(self, branch: Branch) -> tuple[int, ...]:
        (fork,) = branch.fork(1)
        with fork:
            (output,) = self._llm.run([fork], ANSWER)
        if output.error is not None:
            raise output.error
        return output.outputs[0].token_ids

    # ---- the same item otherwise ------------------------------------------------------------

    def _longer(self, item: Item, tokens: int) -> Item:
        """With text of other passages in front of all."""
        text = " ".join(passage.text for passage in self._others(item))
        ids = self._tokenizer.encode(text, add_special_tokens=False)[:tokens]
        if len(ids) < tokens:
            raise ValueError(f"--moved may be {len(ids)} at most, got {tokens}")
        more = self._tokenizer.decode(ids)
        return dataclasses.replace(item, system=f"{item.system} {more}" if tokens else item.system)

    def _edited(self, item: Item, count: int) -> Item:
        """With its first `count` passages replaced by others."""
        others = self._others(item)[:count]
        if count >= len(item.passages):
            raise ValueError(f"--stale may be {len(item.passages) - 1} at most, got {count}")
        return dataclasses.replace(item, passages=(*others, *item.passages[count:]))

    def _others(self, item: Item) -> list[Passage]:
        mine = {passage.id for passage in item.passages}
        found = {p.id: p for other in self._corpus.items for p in other.passages}
        rest = [passage for name, passage in found.items() if name not in mine]
        return random.Random(item.id).sample(rest, min(8, len(rest)))


def _chunk(passage: Passage) -> Chunk:
    return Chunk(passage.text)


def _reversed(item: Item) -> Item:
    """Everything in front of the last passage in the reverse order."""
    *front, last = item.passages
    return dataclasses.replace(item, passages=(*reversed(front), last))


def summary(readings: dict[str, dict[str, list[dict[str, float]]]]) -> dict[str, Any]:
    """Recovery with its interval, and means of the rest, by curve and place."""
    out: dict[str, Any] = {}
    for curve, places in readings.items():
        for at, found in places.items():
            columns = {name: [one[name] for one in found] for name in found[0]}
            recovery = intervals.recovery(columns["kl_patched"], columns["kl_naive"])
            out.setdefault(curve, {})[at] = {
                "items": len(found),
                "recovery": _numbers(recovery),
                **{name: statistics.fmean(column) for name, column in columns.items()},
            }
            if curve == "stale" and at != "0":
                stale = intervals.recovery(columns["kl_patched"], columns["kl_refusing"])
                out[curve][at]["over_refusing"] = _numbers(stale)
    return out


def _numbers(found: intervals.Interval) -> list[float | None]:
    bounds = (found.value, found.low, found.high)
    return [float(value) if np.isfinite(value) else None for value in bounds]


def table(curves: dict[str, Any]) -> str:
    """The curves as markdown."""
    lines = ["| curve | at | recovery | over refusing | KL naive | patched | refusing | fresh "
             "| refused | patch / KV |", "|" + "---|" * 10]  # fmt: skip
    for curve, places in curves.items():
        for at, row in places.items():
            shares = [_told(row.get(name)) for name in ("recovery", "over_refusing")]
            kls = ("kl_naive", "kl_patched", "kl_refusing", "kl_fresh")
            forms = [*((name, "{:.4f}") for name in kls), ("refused", "{:.0%}"),
                     ("patch_share", "{:.0%}")]  # fmt: skip
            rest = [form.format(row[name]) if name in row else "" for name, form in forms]
            lines.append("| " + " | ".join([curve, at, *shares, *rest]) + " |")
    return "\n".join(lines) + "\n"


def _told(share: list[float | None] | None) -> str:
    if share is None:
        return ""
    return " to ".join("-" if value is None else f"{value:.3f}" for value in share[1:]) + (
        "" if share[0] is None else f" ({share[0]:.3f})"
    )
