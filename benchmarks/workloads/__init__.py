"""Request sets for the serving benchmarks: deterministic from a seed, or read from `data`.

A workload from elsewhere joins by an entry in `WORKLOADS`: a function from `Options` to requests.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A piece of a prompt: text, token ids, or the answer to an earlier request of the workload."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    output_of: int | None = None  # that request's place in the workload
    passage: bool = False  # may stand elsewhere in other prompts: a chunk for approximate reuse

    def __post_init__(self) -> None:
        if sum((bool(self.text), bool(self.token_ids), self.output_of is not None)) != 1:
            raise ValueError(f"a part is text, ids or an output, got {self}")


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One prompt, and how much is generated after it."""

    parts: tuple[Part, ...]
    max_tokens: int
    n: int = 1
    at: float | None = None  # seconds after the first request, in a trace

    @property
    def after(self) -> tuple[int, ...]:
        """The requests whose answers this prompt quotes: it starts when they are finished."""
        return tuple(p.output_of for p in self.parts if p.output_of is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the generators read. Lengths are tokens; each workload reads the ones it names."""

    num_prompts: int | None = None  # None: all there are in files, 64 of generated ones
    input_len: int = 256
    output_len: int = 32
    range_ratio: float = 0.0  # lengths are uniform in [1 - r, 1 + r] of what is asked for
    prefix_len: int = 512
    num_prefixes: int = 4
    context_len: int = 256
    num_contexts: int = 4
    prefix_ratio: float = 0.5  # of input_len, before the breaker
    vocab_size: int = 32_000
    seed: int = 0
    trace: str = "mooncake_conversation"
    trace_scale: Fraction = Fraction(1, 64)  # of all lengths
    trace_speed: float = 1.0  # of the clock: 2 sends everything in half the time

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "prefix_len", "num_prefixes", "context_len",
                     "num_contexts"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_prompts is not None and self.num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {self.num_prompts}")
        for name, value in (("range_ratio", self.range_ratio), ("prefix_ratio", self.prefix_ratio)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        if self.vocab_size < 32:
            raise ValueError(f"vocab_size must be at least 32, got {self.vocab_size}")
        if not (self.trace_scale > 0 and self.trace_speed > 0):
            raise ValueError(
                f"a trace's scale and speed must be positive, got {self.trace_scale} and "
                f"{self.trace_speed}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")


Generate = Callable[[Options], Sequence[Request]]


def build(name: str, options: Options) -> list[Request]:
    """The requests of a workload. Raises `ValueError` for a name that is not there."""
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}; there are {', '.join(WORKLOADS)}")
    requests = list(WORKLOADS[name](options))
    if not requests:
        raise ValueError(f"the workload {name} has no requests with {options}")
    for number, request in enumerate(requests):
        assert all(earlier < number for earlier in request.after), (name, number)
    return requests


def digest(requests: Sequence[Request]) -> str:
    """SHA-256 of everything in the requests: equal digests are equal work."""
    rows: list[Any] = [dataclasses.asdict(request) for request in requests]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _table() -> dict[str, Generate]:
    from kvjax.benchmarks.workloads import files, synthetic, traces

    return {
        "random": synthetic.random,
        "shared-prefix": synthetic.shared_prefix,
        "zero-sharing": synthetic.zero_sharing,
        "long-document": synthetic.long_document,
        "prefix-suffix": synthetic.prefix_suffix,
        "stragglers": synthetic.stragglers,
        "system-prompt": files.system_prompt,
        "rag": files.rag,
        "relay": files.relay,
        "parallel-sampling": files.parallel_sampling,
        "document-qa": files.document_qa,
        "text-to-sql": files.text_to_sql,
        "multi-turn": files.multi_turn,
        "trace": traces.replay,
    }


WORKLOADS: dict[str, Generate] = _table()
