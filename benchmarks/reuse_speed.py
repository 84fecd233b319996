"""Time to the first token of prompts over stored chunks, against a full prefill of the same engine.

Two measurements, each interleaved round by round in one process:

- a long prompt over a few stored documents: every strategy, with the share of layer-tokens that it
  runs; the ceiling of its speed-up is one over that share;
- novel queries over a pool of documents that is larger than the store, which therefore evicts: one
  strategy and full prefill in turn, in windows, so that a slow decline would show.
"""

import argparse
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvjax.benchmarks import engine_manifest, manifest, prompts
from kvjax.benchmarks.results import VERSION, require_writable, write_json

METHODS = (
    "naive", "epic:k=16", "random:ratio=0.15", "fusionrag:ratio=0.15,neighbours=0",
    "cachetune:ratio=0.15", "kvshare:ratio=0.15", "cacheclip:ratio=0.15", "cacheblend:ratio=0.15",
)  # fmt: skip
Document = tuple[int, ...]
_SYSTEM = "Answer from the documents that follow.\n\n"
_QUESTION = 32  # tokens behind the last document, new in every prompt
_WINDOW = 50  # queries whose speed-up is told apart


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks reuse-speed`."""
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="SPEC")
    parser.add_argument("--documents", type=int, default=8, help="of a prompt")
    parser.add_argument("--document-tokens", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--queries", type=int, default=300, help="novel ones; 0 leaves them out")
    parser.add_argument("--sustained", default="epic:k=16", metavar="SPEC", help="their strategy")
    parser.add_argument("--out", type=Path, default=Path("bench-results/reuse-speed.json"))


def run(args: argparse.Namespace) -> int:
    """Measures and writes after every method."""
    require_writable(args.out)
    from kvjax.reuse import parse

    for spec in (*args.methods, args.sustained):
        parse(spec)  # a wrong one is refused before anything is loaded
    if min(args.documents, args.document_tokens, args.rounds) < 1 or args.queries < 0:
        raise ValueError("--documents, --document-tokens, --rounds need 1; --queries 0 or more")
    about = manifest.base("reuse-speed")
    engine = _Engine(args)
    record: dict[str, Any] = {
        "version": VERSION,
        "command": "reuse-speed",
        "status": "running",
        "manifest": {**about, "engine": engine.about(), "seeds": {"documents": 0, "queries": 1}},
        "documents": args.documents,
        "document_tokens": args.document_tokens,
        "rounds": args.rounds,
        "long_prompt": {},
    }
    for spec, row in _long_prompt(engine, args):
        record["long_prompt"][spec] = row
        write_json(args.out, record)
        print(_line(spec, row), flush=True)
    if args.queries:
        record["novel_queries"] = _novel_queries(engine, args)
        write_json(args.out, record)
        print(_sustained_line(record["novel_queries"]), flush=True)
    record["status"] = "complete"
    write_json(args.out, record)
    return 0


class _Engine:
    """One engine, and prompts over documents and questions cut from `prompts.text()`."""

    def __init__(self, args: argparse.Namespace) -> None:
        from kvjax import LLM

        self.llm = LLM(
            args.model, dtype=args.dtype, max_model_len=args.documents * args.document_tokens + 256,
            max_num_seqs=4, max_num_batched_tokens=512, force_reuse=True,
        )  # fmt: skip
        self.llm.warm_up()
        self._tokenizer = self.llm.get_tokenizer()
        self._ids = list(self._tokenizer.encode(prompts.text()))
        self._random = random.Random(0)

    def about(self) -> dict[str, Any]:
        """What the engine is, for the manifest."""
        return engine_manifest.of_engine(self.llm.engine, self._tokenizer)

    def cut(self, tokens: int) -> list[int]:
        """So many consecutive ids from anywhere in the text."""
        start = self._random.randrange(len(self._ids) - tokens)
        return self._ids[start : start + tokens]

    def first_token(self, documents: Sequence[Document], spec: str) -> tuple[float, Any]:
        """Seconds to the first token behind a new question, no prefix cached; and the report."""
        from kvjax import Chunk, SamplingParams

        self.llm.reset_prefix_cache()
        question = self._tokenizer.decode(self.cut(_QUESTION))
        prompt = [_SYSTEM, *map(Chunk, documents), question]
        (output,) = self.llm.generate(
            [prompt], SamplingParams(max_tokens=1, temperature=0, reuse=spec)
        )
        if output.error is not None:
            raise output.error
        assert output.metrics is not None
        seconds = output.metrics.time_to_first_token
        assert seconds is not None, "a prompt that did not fail has a first token"
        return seconds, output.reuse


def _long_prompt(engine: _Engine, args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """One method after another, each in turn with full prefill: first tokens in seconds."""
    documents = [tuple(engine.cut(args.document_tokens)) for _ in range(args.documents)]
    for spec in args.methods:
        for _ in range(2):  # chunks are encoded, then the programs of this plan compiled
            engine.first_token(documents, spec)
        engine.first_token(documents, "prefix")
        full, reused, report = [], [], None
        for _ in range(args.rounds):
            full.append(engine.first_token(documents, "prefix")[0])
            seconds, report = engine.first_token(documents, spec)
            reused.append(seconds)
        assert report is not None, "a prompt with chunks has a report"
        ratios = sorted(a / b for a, b in zip(full, reused, strict=True))
        yield (
            spec,
            {
                "prompt_tokens": report.num_tokens,
                "full_s": full,
                "reused_s": reused,
                "speed_up": statistics.median(ratios),
                "speed_up_min": ratios[0],
                "speed_up_max": ratios[-1],
                "share_run": report.share_run,
                "copied_tokens": report.copied_tokens,
                "of_ceiling": statistics.median(ratios) * report.share_run,
            },
        )


def _novel_queries(engine: _Engine, args: argparse.Namespace) -> dict[str, Any]:
    """Queries of a quarter of the documents each, drawn from a pool twice the store's size.

    Documents are drawn with the popularity of Zipf's law; one that is not stored is encoded while
    its query waits, which counts.
    """
    store = engine.llm.engine.chunks.store
    page = engine.llm.engine.spec.page_size
    pages_each = -(-args.document_tokens // page)
    pool = [tuple(engine.cut(args.document_tokens))
            for _ in range(max(4, 2 * store.capacity_pages // pages_each))]  # fmt: skip
    popularity = [1 / (rank + 1) for rank in range(len(pool))]
    drawn = random.Random(1)
    count = max(1, args.documents // 4)
    before = store.stats
    rows: list[tuple[float, float]] = []
    for _ in range(args.queries):
        documents: list[Document] = []
        while len(documents) < count:
            (document,) = drawn.choices(pool, popularity)
            if document not in documents:
                documents.append(document)
        reused, _ = engine.first_token(documents, args.sustained)
        full, _ = engine.first_token(documents, "prefix")
        rows.append((full, reused))
    after = store.stats
    windows = [rows[i : i + _WINDOW] for i in range(0, len(rows), _WINDOW)]
    return {
        "method": args.sustained,
        "documents_in_pool": len(pool),
        "capacity_pages": store.capacity_pages,
        "pages_at_the_end": after.pages,
        "admitted": after.admitted - before.admitted,
        "evicted": after.evicted - before.evicted,
        "full_s": [full for full, _ in rows],
        "reused_s": [reused for _, reused in rows],
        "speed_up_total": sum(full for full, _ in rows) / sum(reused for _, reused in rows),
        "speed_up_by_window": [
            sum(full for full, _ in window) / sum(reused for _, reused in window)
            for window in windows
        ],
    }


def _line(spec: str, row: dict[str, Any]) -> str:
    full, reused = statistics.median(row["full_s"]), statistics.median(row["reused_s"])
    return (
        f"{spec:24} {reused * 1e3:8.1f} ms against {full * 1e3:8.1f} ms: {row['speed_up']:.2f}x "
        f"({row['speed_up_min']:.2f} to {row['speed_up_max']:.2f}), {row['share_run']:.1%} of "
        f"layer-tokens run, {row['of_ceiling']:.0%} of the ceiling"
    )


def _sustained_line(found: dict[str, Any]) -> str:
    windows = ", ".join(f"{x:.2f}" for x in found["speed_up_by_window"])
    return (
        f"{len(found['full_s'])} novel queries, {found['method']}: {found['speed_up_total']:.2f}x "
        f"in all; by {_WINDOW}: {windows}; {found['admitted']} chunks admitted, "
        f"{found['evicted']} evicted, {found['pages_at_the_end']} of "
        f"{found['capacity_pages']} pages"
    )
