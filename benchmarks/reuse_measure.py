"""Reads reuse strategies off one engine: each prompt's KV and logits against its full prefill's.

Chunks are encoded when a prompt first misses them, in a pass that is not timed; the pass that is
finds them stored, its programs compiled, and no prefix but the one `prefix` stands for.
"""

import argparse
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kvjax import __version__
from kvjax.benchmarks import divergence, engine_manifest
from kvjax.benchmarks.corpora import Corpus, Generation, Item, Passage, solves
from kvjax.benchmarks.reuse_reading import Reading
from kvjax.branch import Branch
from kvjax.cache.chunks import VariantKey, tokens_hash
from kvjax.llm import LLM
from kvjax.observing import observes
from kvjax.readout import LayerKV
from kvjax.request import Chunk, SamplingParams
from kvjax.reuse import PrefixOnly, Strategy, parse
from kvjax.reuse.controls import Oracle
from kvjax.reuse.kamera import Kamera
from kvjax.reuse.relaycaching import RelayCaching
from kvjax.reuse.strategy import Prompt, Segment

ANSWER_TOKENS = (8, 16)  # least and most of a greedy answer
_GREEDY = SamplingParams(temperature=0, min_tokens=ANSWER_TOKENS[0], max_tokens=ANSWER_TOKENS[1])


@dataclasses.dataclass(frozen=True, slots=True)
class _Reference:
    """An item's full prefill: what every method is held against."""

    ids: tuple[int, ...]
    answer: tuple[int, ...]  # greedy
    logits: np.ndarray  # f32[len(answer), vocab]
    kv: tuple[LayerKV, ...]


class EngineInstrument:
    """An `Instrument` over one `LLM`, of which it takes no heed of cached prefixes."""

    def __init__(self, llm: LLM, about: Mapping[str, Any]) -> None:
        self._llm, self._about = llm, dict(about)
        self._tokenizer = llm.get_tokenizer()
        self._reference: tuple[Item, _Reference] | None = None
        self._passages: list[Passage] = []  # of the corpus
        self._forgets = True  # whether an item's chunks go when it is done

    def about(self) -> Mapping[str, Any]:
        """Model, types, device, versions."""
        return self._about

    def generate(self, prompts: Sequence[str], max_tokens: int) -> Sequence[Generation]:
        """Greedy continuations without the end token."""
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        made: list[Generation] = []
        for output in self._llm.generate(list(prompts), params):
            if output.error is not None:
                raise output.error
            (completion,) = output.outputs
            ids = completion.token_ids
            if completion.finish_reason == "stop" and ids:
                ids = ids[:-1]
            made.append(Generation(completion.text, ids))
        return made

    def learns(self, method: str) -> bool:
        """Whether a method keeps what it saw of prompts."""
        return observes(self._strategy(method))

    def begin(self, corpus: Corpus, methods: Sequence[str]) -> None:
        """Empties the stores; strategies that learn from prompts see the warm-up items, and learn
        nothing afterwards."""
        self._llm.engine.chunks.forget()
        self._llm.reset_prefix_cache()
        self._reference = None
        passages = {p.id: p for item in corpus.items for p in item.passages}
        self._passages = list(passages.values())
        learners = [s for s in map(self._strategy, methods) if observes(s)]
        self._forgets = not learners
        for strategy in learners:
            self._learn(corpus, strategy)

    def _learn(self, corpus: Corpus, strategy: Strategy) -> None:
        params = SamplingParams(reuse=strategy, extra_args={"learn": True})
        for item in corpus.warm_up:
            self._llm.reset_prefix_cache()
            self._llm.open(self._prompt(item), params).close()

    def _provide(self, item: Item, strategy: Strategy) -> None:
        """What a strategy has made ahead of time, for this item: a bounded store surely holds it.

        Nothing of it depends on the question.
        """
        kind = type(strategy)
        if kind.enrich is not Strategy.enrich:
            mine, corpus = (
                list(map(self._chunk, some)) for some in (item.passages, self._passages)
            )
            self._llm.chunks.put(mine, strategy=strategy, corpus=corpus)
        elif kind.related is not Strategy.related:
            numbers = {passage.id: number for number, passage in enumerate(item.passages)}
            parents = [[numbers[p] for p in x.parents if p in numbers] for x in item.passages]
            mine = list(map(self._chunk, item.passages))
            self._llm.chunks.put(mine, strategy=strategy, parents=parents)
        if isinstance(strategy, Kamera):
            self._llm.condition(self._prompt(item)[:-1], strategy=strategy)
        if isinstance(strategy, RelayCaching):
            for passage in item.passages:
                if passage.source is not None and passage.token_ids:
                    params = SamplingParams(temperature=0, max_tokens=len(passage.token_ids))
                    self._llm.relay(passage.source, params)

    def measure(self, item: Item, method: str) -> Reading:
        """One reading."""
        strategy, reference = self._strategy(method), self._reference_of(item)
        about: dict[str, Any] = {"learn": False}
        if isinstance(strategy, Oracle):
            about["oracle"] = self._deviations(item, reference)
        params = SamplingParams(reuse=strategy, extra_args=about)
        self._provide(item, strategy)
        with self._open(item, method, params) as branch:
            assert branch.token_ids == reference.ids
            report = branch.reuse
            assert report is not None, "a prompt with chunks has a report"
            logits = branch.logits(reference.answer[:-1])
            deviation = [
                float(kv_deviation(*pair).mean())
                for pair in zip(reference.kv, branch.kv(), strict=True)
            ]
            gold = self._gold_logprob(item, branch)
            answer, text = self._answer(branch)
        kl = divergence.kl_divergence(reference.logits, logits)
        return Reading(
            kl_1=float(kl[0]),
            kl_answer=float(kl.mean()),
            top1=bool(divergence.same_top(reference.logits[:1], logits[:1])[0]),
            agreement=divergence.agreement(reference.answer, answer),
            solved=solves(item, text),
            gold_logprob=gold,
            kv_deviation=tuple(deviation),
            computed_layer_tokens=report.run_layer_tokens,
            total_layer_tokens=report.num_layers * report.num_tokens,
            copied_tokens=report.copied_tokens,
            stored_bytes_per_token=self._stored_bytes(item, strategy, reference.ids),
            prefill_s=self._time(item, method, params),
        )

    # ---- one prompt -------------------------------------------------------------------------

    def _strategy(self, method: str) -> Strategy:
        return PrefixOnly() if method == "full" else parse(method)

    def _chunk(self, passage: Passage) -> Chunk:
        return Chunk(passage.text if passage.token_ids is None else passage.token_ids)

    def _prompt(self, item: Item) -> list[str | Chunk]:
        return item.prompt(self._chunk)

    def _clear(self, item: Item, method: str) -> None:
        """Leaves no cached prefix; for `prefix`, the text before the passages alone."""
        self._llm.reset_prefix_cache()
        if method == "prefix":
            self._llm.open(item.head).close()

    def _open(self, item: Item, method: str, params: SamplingParams) -> Branch:
        """The prompt, again if chunks of it were encoded for it: what that leaves behind in the
        prefix cache is no merit of the method."""
        store = self._llm.engine.chunks.store
        self._clear(item, method)
        admitted = store.stats.admitted
        branch = self._llm.open(self._prompt(item), params)
        if store.stats.admitted == admitted:
            return branch
        branch.close()
        self._clear(item, method)
        return self._llm.open(self._prompt(item), params)

    def _reference_of(self, item: Item) -> _Reference:
        if self._reference is None or self._reference[0] != item:
            if self._forgets:  # else a store full of earlier items lets nothing in
                self._llm.engine.chunks.forget()
            with self._open(item, "full", SamplingParams(reuse=PrefixOnly())) as branch:
                ids, kv = branch.token_ids, branch.kv()
                answer, _ = self._answer(branch)
                logits = branch.logits(answer[:-1])
            self._reference = (item, _Reference(ids, answer, logits, kv))
        return self._reference[1]

    def _answer(self, branch: Branch) -> tuple[tuple[int, ...], str]:
        (fork,) = branch.fork(1)
        with fork:
            (output,) = self._llm.run([fork], _GREEDY)
        if output.error is not None:
            raise output.error
        return output.outputs[0].token_ids, output.outputs[0].text

    def _gold_logprob(self, item: Item, branch: Branch) -> float | None:
        if not item.answer:
            return None
        space = " " if item.lead and not item.lead.endswith(" ") else ""
        ids = self._tokenizer.encode(space + item.answer, add_special_tokens=False)
        logprobs = divergence.log_softmax(branch.logits(ids[:-1]))
        return float(logprobs[np.arange(len(ids)), ids].sum())

    def _deviations(self, item: Item, reference: _Reference) -> tuple[float, ...]:
        """What the oracle goes by: each token's KV deviation under naive reuse, over all layers."""
        with self._open(item, "naive", SamplingParams(reuse="naive")) as branch:
            pairs = zip(reference.kv, branch.kv(), strict=True)
            return tuple(np.sum([kv_deviation(*pair) for pair in pairs], axis=0).tolist())

    def _stored_bytes(self, item: Item, strategy: Strategy, ids: tuple[int, ...]) -> float:
        """Bytes that the variants which serve this prompt take, over their tokens."""
        chunks, segments, at = self._llm.engine.chunks, [], 0
        for number, part in enumerate(self._prompt(item)):
            content = part.content if isinstance(part, Chunk) else part
            if isinstance(content, str):
                special = number == 0 and not isinstance(part, Chunk)
                content = self._tokenizer.encode(content, add_special_tokens=special)
            stop = at + len(content)
            if isinstance(part, Chunk):
                segments.append(Segment(at, stop, tokens_hash(ids[at:stop])))
            at = stop
        prompt = Prompt(ids, tuple(segments), None, chunks.facts)
        found = {
            id(variant): variant
            for number in range(len(segments))
            if (variant := strategy.look_up(prompt, number, chunks.store)) is not None
        }
        tokens = sum(v.num_tokens for v in found.values())
        arrays = [
            a.nbytes for v in found.values() for a in (*v.scores.values(), *v.arrays.values())
        ]
        if isinstance(strategy, Kamera):
            for number, segment in enumerate(segments):
                variant = chunks.store.get(VariantKey(None, segment.chunk, ""))
                patch = None if variant is None else strategy.patch_of(variant, prompt, number)
                arrays.append(0 if patch is None else patch.num_bytes)
        return chunks.facts.kv_token_bytes + sum(arrays) / tokens if tokens else 0.0

    def _time(self, item: Item, method: str, params: SamplingParams) -> float:
        """Seconds from the prompt's text to its first token."""
        once = dataclasses.replace(params, temperature=0.0, max_tokens=1)
        runner = self._llm.engine.runner
        while True:
            self._clear(item, method)
            compiles, start = runner.compiles, time.perf_counter()
            (output,) = self._llm.generate([self._prompt(item)], once)
            elapsed = time.perf_counter() - start
            if output.error is not None:
                raise output.error
            if runner.compiles == compiles:  # else a program compiled within that time
                return elapsed


def open_instrument(args: argparse.Namespace) -> EngineInstrument:
    """An instrument over `args.model` in `args.dtype`, on this process' device."""
    llm = LLM(
        args.model, dtype=args.dtype, deterministic=True, force_reuse=True, max_num_seqs=4, seed=0
    )
    return EngineInstrument(llm, about(llm, args.model))


def about(llm: LLM, model: str) -> dict[str, Any]:
    """What readings of `llm` depend on, beside the corpus."""
    config = llm.engine.config
    return {
        "model": str(model),
        "weights": llm.checkpoint.fingerprint[:16],
        "dtype": config.dtype,
        "kv_dtype": config.kv_dtype,
        "device": jax.devices()[0].device_kind,
        "kvjax": __version__,
        "jax": jax.__version__,
        "engine": engine_manifest.of_engine(llm.engine, llm.get_tokenizer()),
    }


def kv_deviation(full: LayerKV, other: LayerKV) -> np.ndarray:
    """Per token, squared distance of a layer's keys and values over the full prefill's squares."""
    squares, distance = np.zeros(len(full.k)), np.zeros(len(full.k))
    for a, b in ((full.k, other.k), (full.v, other.v)):
        if a is not None and b is not None:
            a64 = a.reshape(len(a), -1).astype(np.float64)
            squares += np.square(a64).sum(axis=1)
            distance += np.square(b.reshape(len(b), -1) - a64).sum(axis=1)
    return distance / squares
