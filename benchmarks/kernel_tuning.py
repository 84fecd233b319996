"""`kvjax bench kernels --tune`: block sizes tried on this device, the best kept in its table."""

import dataclasses
import itertools
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


def _decodes(sizes: cases.Sizes, dtype: str) -> list[cases.Subject]:
    return [
        cases.decode(sizes, dtype, batch, sizes.contexts[-1])
        for batch in (sizes.batches[0], sizes.batches[-1])
    ]


def _prefills(sizes: cases.Sizes, dtype: str) -> list[cases.Subject]:
    return [cases.prefill(sizes, dtype, tokens) for tokens in sizes.prefills]


def _masses(sizes: cases.Sizes, dtype: str) -> list[cases.Subject]:
    return [cases.mass(sizes, dtype)]


TUNABLES = [
    Tunable(
        "paged_attention/cpu_tile", "paged_attention", "cpu", {"rows": (48, 72, 96, 144, 192, 384)},
        _prefills,
    ),
    Tunable(
        "paged_attention/gpu_decode", "paged_attention", "gpu",
        {"block": (64, 128), "stages": (2, 3, 4), "split": (512, 1024, 2048)},
        _decodes,
    ),
    Tunable(
        "paged_attention/gpu_prefill", "paged_attention", "gpu",
        {"block": (64, 128), "stages": (2, 3, 4)}, _prefills,
    ),
    Tunable(
        "attention_mass/gpu_keys", "attention_mass", "gpu",
        {"block": (64, 128), "stages": (2, 3, 4), "split": (512, 1024, 2048)}, _masses,
    ),
    Tunable(
        "paged_attention/tpu_keys", "paged_attention", "tpu", {"keys": (128, 256, 512, 1024)},
        lambda sizes, dtype: [*_decodes(sizes, dtype), *_prefills(sizes, dtype)],
    ),
    Tunable(
        "paged_attention/tpu_prefill", "paged_attention", "tpu",
        {"tile": (32, 64, 128, 256), "chunk": (8, 16, 32)}, _prefills,
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
    """Tries all candidates; records the best if it beats the sizes of now. Returns it if so.

    It is recorded for the facts that the cases' own calls ask for.
    """
    kernel = tunable.kernel
    with tuning.asking(kernel) as asked:
        now = _seconds(tunable, sizes, dtype, rounds)
    print(f"{kernel} as it is: {_told(now)}", flush=True)
    if not asked:
        print(f"{kernel}: its cases do not reach it")
        return None
    works: dict[tuple[tuple[str, int], ...], float] = {}
    try:
        for candidate in candidates(tunable):
            tuning.try_sizes(kernel, candidate)
            seconds = _seconds(tunable, sizes, dtype, rounds)
            print(f"{kernel} {candidate}: {_told(seconds)}", flush=True)
            if isinstance(seconds, float):
                works[tuple(candidate.items())] = seconds
    finally:
        tuning.try_sizes(kernel, None)
    again = _seconds(tunable, sizes, dtype, rounds)  # the machine may have been busy at first
    if isinstance(now, float) and isinstance(again, float):
        now = min(now, again)
    best = min(works, key=lambda items: works[items], default=None)
    if best is None or (isinstance(now, float) and works[best] * _GAIN > now):
        print(f"{kernel}: stays as it is")
        return None
    for facts in asked:
        written = tuning.record(kernel, facts, dict(best)).name
        print(f"{kernel}: {dict(best)} for {facts} written to {written}")
    return dict(best)


def candidates(tunable: Tunable) -> Iterator[dict[str, int]]:
    """Every combination of the sizes to try."""
    for values in itertools.product(*tunable.candidates.values()):
        yield dict(zip(tunable.candidates, values, strict=True))


def _seconds(tunable: Tunable, sizes: cases.Sizes, dtype: str, rounds: int) -> float | str:
    """Seconds of all deciding cases, or why these sizes cannot be used.

    No other backend steps in. Where it refuses one of the cases, nothing is compiled or run.
    """
    total = 0.0
    jax.clear_caches()  # what was traced with other sizes
    try:
        with OPERATIONS[tunable.operation].only(tunable.backend):
            subjects = tunable.subjects(sizes, dtype)
            for subject in subjects:
                jax.eval_shape(subject.step, subject.constants, subject.carry)
            for subject in subjects:
                timer = Timer(subject)
                timer.warm_up()
                total += min(timer() for _ in range(rounds))
    except NotImplementedError as why:
        return f"refused, {why}"
    except Exception as error:  # too large for the device: a finding, not a failure
        return f"{type(error).__name__}: {error}"
    return total


def _told(seconds: float | str) -> str:
    return seconds[:160] if isinstance(seconds, str) else f"{seconds * 1e3:.3f} ms"
