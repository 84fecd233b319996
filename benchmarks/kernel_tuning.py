"""`kvjax bench kernels --tune`: block sizes tried on this device, the best kept in its table."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterator

import jax

from kvjax.benchmarks import kernel_cases as cases
from kvjax.benchmarks.kernels import Timer
from kvjax.pallas_kernels import OPERATIONS, tuning

_GAIN = 1.02  # a table entry has to be this much faster than the rule


@dataclasses.dataclass(frozen=True)
class Tunable:
    """Sizes to try for a kernel, and the cases that decide."""

    kernel: str
    operation: str
    backend: str
    candidates: dict[str, tuple[int, ...]]
    subjects: Callable[[cases.Sizes, str], list[cases.Subject]]


TUNABLES = [
    Tunable(
        "paged_attention/gpu_decode", "paged_attention", "gpu",
        {"block": (64, 128), "stages": (2, 3, 4), "split": (512, 1024, 2048)},
        lambda sizes, dtype: [
            cases.decode(sizes, dtype, batch, sizes.contexts[-1])
            for batch in (sizes.batches[0], sizes.batches[-1])
        ],
    ),
    Tunable(
        "paged_attention/gpu_prefill", "paged_attention", "gpu",
        {"block": (64, 128), "stages": (2, 3, 4)},
        lambda sizes, dtype: [cases.prefill(sizes, dtype, sizes.prefills[-1])],
    ),
]  # fmt: skip


def run(sizes: cases.Sizes, dtype: str, rounds: int) -> int:
    """Tunes every kernel that runs on the default device; says so where none does."""
    platform = jax.default_backend()
    here = [t for t in TUNABLES if OPERATIONS[t.operation].order(platform)[0] == t.backend]
    for tunable in here:
        tune(tunable, sizes, dtype, rounds)
    if not here:
        print(f"nothing to tune on {platform}: its backends have no block sizes")
    return 0


def tune(tunable: Tunable, sizes: cases.Sizes, dtype: str, rounds: int) -> dict[str, int] | None:
    """Tries all candidates; records the best if it beats the rule. Returns what it recorded."""
    bits = 8 * cases.item_size(dtype)
    facts = {"head_dim": sizes.heads.width, "page_size": sizes.page_size, "bits": bits}
    kernel = tunable.kernel
    rule = tuning.RULES[kernel](**facts)
    tried = {}
    try:
        for candidate in (rule, *_candidates(tunable)):
            tuning.try_sizes(kernel, candidate)
            tried[tuple(candidate.items())] = _seconds(tunable, sizes, dtype, rounds)
            print(f"{kernel} {candidate}: {_told(tried[tuple(candidate.items())])}", flush=True)
    finally:
        tuning.try_sizes(kernel, None)
    by_rule = tried[tuple(rule.items())]
    works = {items: seconds for items, seconds in tried.items() if isinstance(seconds, float)}
    if not works:
        return None
    best = min(works, key=lambda items: works[items])
    if isinstance(by_rule, float) and works[best] * _GAIN > by_rule:
        print(f"{kernel}: the rule stays")
        return None
    print(f"{kernel}: {dict(best)} written to {tuning.record(kernel, facts, dict(best)).name}")
    return dict(best)


def _candidates(tunable: Tunable) -> Iterator[dict[str, int]]:
    for values in itertools.product(*tunable.candidates.values()):
        yield dict(zip(tunable.candidates, values, strict=True))


def _seconds(tunable: Tunable, sizes: cases.Sizes, dtype: str, rounds: int) -> float | str:
    """Seconds of all deciding cases, or why these sizes cannot be used."""
    total = 0.0
    try:
        for subject in tunable.subjects(sizes, dtype):
            timer = Timer(subject)
            timer.warm_up()
            total += statistics.median(timer() for _ in range(rounds))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return total


def _told(seconds: float | str) -> str:
    return seconds[:100] if isinstance(seconds, str) else f"{seconds * 1e3:.3f} ms"
