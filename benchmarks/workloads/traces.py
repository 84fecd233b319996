"""Replay of request traces: their arrivals, lengths and shared blocks, at a stated scale.

The traces have no text. A block of 512 tokens that has a hash id becomes `512 * scale`
pseudo-random tokens that depend on seed and id alone, so equal blocks are equal wherever they come.
Sources and licences are in `data/traces/README.md`.
"""

import csv
import dataclasses
import datetime
import json
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from kvjax.benchmarks.workloads import Options, Part, Request
from kvjax.benchmarks.workloads.synthetic import tokens

FOLDER = Path(__file__).parent.parent / "data" / "traces"
BLOCK = 512
TRACES = {
    "mooncake_conversation": "mooncake_conversation_trace.jsonl.xz",
    "mooncake_synthetic": "mooncake_synthetic_trace.jsonl.xz",
    "azure_code": "AzureLLMInferenceTrace_code.csv.xz",
    "azure_conversation": "AzureLLMInferenceTrace_conv.csv.xz",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace, at its original size."""

    at: float  # seconds after the first
    input_len: int
    output_len: int
    blocks: tuple[int, ...]  # hash ids; none: nothing is known to be shared


def read(name: str) -> Iterator[Row]:
    """Rows of a trace by its name, or of a file (`.jsonl`, `.csv`, also as `.xz`), in its order.

    Raises `ValueError` for a name that is neither.
    """
    path = FOLDER / TRACES[name] if name in TRACES else Path(name)
    if not path.is_file():
        raise ValueError(f"{name!r} is no trace of {', '.join(TRACES)}, and no file")
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as file:
        assert not isinstance(file, lzma.LZMAFile)
        yield from (_csv if ".csv" in path.suffixes else _jsonl)(file)


def replay(o: Options) -> Sequence[Request]:
    """The first `num_prompts` requests (None: 64), scaled; arrivals count from the first."""
    size = max(1, round(BLOCK * o.trace_scale))
    found: list[Request] = []
    for number, row in enumerate(read(o.trace)):
        if number == (o.num_prompts or 64):
            break
        length = max(1, round(row.input_len * o.trace_scale))
        ids: list[int] = []
        for block in row.blocks:
            ids += tokens(np.random.default_rng([o.seed, 1, block]), size, o.vocab_size)
        rest = max(0, length - len(ids))
        ids += tokens(np.random.default_rng([o.seed, 2, number]), rest, o.vocab_size)
        output = max(1, round(row.output_len * o.trace_scale))
        part = Part(token_ids=tuple(ids[:length]))
        found.append(Request((part,), output, at=row.at / o.trace_speed))
    return found


def _jsonl(file: TextIO) -> Iterator[Row]:
    start = None
    for line in file:
        row = json.loads(line)
        start = row["timestamp"] if start is None else start
        at = (row["timestamp"] - start) / 1000
        yield Row(at, row["input_length"], row["output_length"], tuple(row.get("hash_ids", ())))


def _csv(file: TextIO) -> Iterator[Row]:
    start = None
    for row in csv.DictReader(file):
        when = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26])  # to the microsecond
        start = when if start is None else start
        at = (when - start).total_seconds()
        yield Row(at, int(row["ContextTokens"]), int(row["GeneratedTokens"]), ())
