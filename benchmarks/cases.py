"""The cases of the engine benchmark: the prompts of a round, and what is timed on one worker."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from kvjax.benchmarks.prompts import TokenStream
from kvjax.benchmarks.workers import Worker


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of tokens and requests. The defaults are those of the published tables."""

    prompt: int = 512
    new: int = 128
    batch: int = 8
    prefix: int = 1500
    tail: int = 32
    shared_new: int = 64
    start_up_prompt: int = 16

    def __post_init__(self) -> None:
        if self.new < 2 or min(dataclasses.astuple(self)) < 1:
            raise ValueError(f"sizes must be positive and new at least 2, got {self}")


SMOKE = Sizes(prompt=48, new=8, batch=4, prefix=160, tail=16, shared_new=4)


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """Numbers by metric name, and the tokens to compare between targets, if any."""

    values: dict[str, float]
    token_ids: list[int] | None = None


class Case(Protocol):
    """Times something on one running worker whose prefix cache is empty at the start."""

    def prompts(self, sizes: Sizes, stream: TokenStream) -> list[list[int]]:
        """New prompts for one round; all targets get the same."""
        ...

    def measure(self, worker: Worker, prompts: list[list[int]], sizes: Sizes) -> Measured:
        """Runs the prompts; raises WorkerFailed or UnequalWork."""
        ...


class Prefill:
    """Tokens per second of one prompt: its length over the time of a call for one token."""

    def prompts(self, sizes: Sizes, stream: TokenStream) -> list[list[int]]:
        return [stream.take(sizes.prompt)]

    def measure(self, worker: Worker, prompts: list[list[int]], sizes: Sizes) -> Measured:
        seconds = worker.generate(prompts, 1).seconds
        return Measured({"prefill_tps": sizes.prompt / seconds})


class DecodeOne:
    """Tokens per second of one sequence, after its first token (a second call where unknown)."""

    def prompts(self, sizes: Sizes, stream: TokenStream) -> list[list[int]]:
        return [stream.take(sizes.prompt), stream.take(sizes.prompt)]

    def measure(self, worker: Worker, prompts: list[list[int]], sizes: Sizes) -> Measured:
        done = worker.generate(prompts[:1], sizes.new)
        if done.first_token_s is None:
            first = worker.generate(prompts[1:], 1).seconds
        else:
            first = done.first_token_s[0]
        rate = _rate(sizes.new - 1, done.seconds - first)
        return Measured({"decode_b1_tps": rate}, done.token_ids[0])


class DecodeBatch:
    """Tokens per second of a batch: `batch * (new - 1) / (T(new) - T(1))`, and `T(new)` itself.

    The two times are of separate calls with different prompts, so that no target can reuse KV.
    """

    def prompts(self, sizes: Sizes, stream: TokenStream) -> list[list[int]]:
        return [stream.take(sizes.prompt) for _ in range(2 * sizes.batch)]

    def measure(self, worker: Worker, prompts: list[list[int]], sizes: Sizes) -> Measured:
        one = worker.generate(prompts[: sizes.batch], 1).seconds
        worker.reset()
        total = worker.generate(prompts[sizes.batch :], sizes.new).seconds
        rate = _rate(sizes.batch * (sizes.new - 1), total - one)
        return Measured({"decode_b8_tps": rate, "total_b8_s": total})


class SharedPrefix:
    """A long prompt cold, another one with the same prefix, then a batch of them at once."""

    def prompts(self, sizes: Sizes, stream: TokenStream) -> list[list[int]]:
        prefix = stream.take(sizes.prefix)
        return [prefix + stream.take(sizes.tail) for _ in range(2 + sizes.batch)]

    def measure(self, worker: Worker, prompts: list[list[int]], sizes: Sizes) -> Measured:
        cold, warm, *others = prompts
        values = {"ttft_cold_s": worker.generate([cold], 1).seconds}
        worker.keep_prefix(cold[: sizes.prefix])
        values["ttft_warm_s"] = worker.generate([warm], 1).seconds
        values["shared_prefix_s"] = worker.generate(others, sizes.shared_new).seconds
        return Measured(values)


CASES: dict[str, Case] = {
    "prefill": Prefill(),
    "decode_b1": DecodeOne(),
    "decode_b8": DecodeBatch(),
    "prefix": SharedPrefix(),
}
START_UP = "start_up"  # a case, too, but one that starts processes: see `engine.py`


def warm_up(
    worker: Worker, prompt: list[int], long_prompt: list[int], batch: list[list[int]]
) -> None:
    """Runs each shape once, untimed."""
    worker.generate([prompt], 4)
    worker.generate(batch, 4)
    worker.generate([long_prompt], 2)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens are equal."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


def _rate(num_tokens: int, seconds: float) -> float:
    if seconds <= 0:
        raise ValueError(f"{num_tokens} tokens in {seconds:.4f} s: noise is larger than the work")
    return num_tokens / seconds
