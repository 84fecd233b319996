"""Runs the cases of the engine benchmark on several targets in turn, on one machine.

For every case and round the targets run one after the other, in an order that rotates with the
round; the others are paused. A target that fails keeps its earlier values and gets an error row.
"""

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from kvjax.benchmarks import manifest
from kvjax.benchmarks.cases import CASES, START_UP, Sizes, common_length, warm_up
from kvjax.benchmarks.prompts import TokenStream
from kvjax.benchmarks.results import Results
from kvjax.benchmarks.workers import Target, UnequalWork, Worker, WorkerFailed

T = TypeVar("T")
IDLE_SECONDS = 0.5  # a loaded worker is watched this long before it is paused
_ERRORS = (WorkerFailed, UnequalWork, ValueError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run: cases in order, rounds of each, and the token ids that prompts are cut from."""

    cases: Sequence[str]
    rounds: int
    sizes: Sizes
    token_ids: Sequence[int]
    timeout_s: float = 900.0
    log_folder: Path | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.cases) - {START_UP, *CASES})
        if unknown:
            raise ValueError(f"unknown cases {unknown}; there are {[START_UP, *CASES]}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be positive, got {self.rounds}")
        if self.log_folder is not None:
            self.log_folder.mkdir(parents=True, exist_ok=True)
        stream = TokenStream(self.token_ids)  # a text too short is found before anything starts
        self.warm_up_prompts(stream)
        for case in self.timed_cases:
            for _ in range(self.rounds):
                CASES[case].prompts(self.sizes, stream)

    @property
    def timed_cases(self) -> list[str]:
        """The cases that run on loaded workers."""
        return [case for case in self.cases if case != START_UP]

    def warm_up_prompts(self, stream: TokenStream) -> list[list[int]]:
        """A prompt, a long prompt and a batch of short ones, for untimed runs."""
        sizes = self.sizes
        lengths = [sizes.prompt, sizes.prefix + sizes.tail, *[sizes.tail] * sizes.batch]
        return [stream.take(length) for length in lengths]


def rotated(items: Sequence[T], by: int) -> list[T]:
    """The items in order, starting at the `by`-th (modulo their number)."""
    start = by % len(items) if items else 0
    return [*items[start:], *items[:start]]


def run(
    targets: Mapping[str, Sequence[Target]],
    plan: Plan,
    out: Results,
    say: Callable[[str], None] = print,
) -> None:
    """Measures all cases for each dtype (the keys) and saves `out` after every measurement.

    When it is interrupted, the file says so and KeyboardInterrupt goes on to the caller.
    """
    out.save()
    try:
        for dtype, group in targets.items():
            part = _Part(dtype, plan, out, say)
            if START_UP in plan.cases:
                part.measure_start_up(group)
            if plan.timed_cases:
                part.measure_cases(group)
        out.status = "complete"
    except KeyboardInterrupt:
        out.status = "interrupted"
        raise
    except BaseException:
        out.status = "failed"
        raise
    finally:
        out.manifest["load_average_after"] = list(os.getloadavg())
        out.save()


class _OtherCores:
    """Measures how many cores everything but `worker` uses during the block (Linux)."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.values: dict[str, float] = {}

    def __enter__(self) -> "_OtherCores":
        self._before = self._read()
        return self

    def __exit__(self, *exception: object) -> None:
        after = self._read()
        if self._before is not None and after is not None:
            seconds = after[0] - self._before[0]
            cores = (after[1] - self._before[1]) / max(seconds, 1e-9)
            self.values = {"other_cores": max(0.0, cores)}

    def _read(self) -> tuple[float, float] | None:
        busy = manifest.busy_seconds()
        return None if busy is None else (time.monotonic(), busy - self.worker.cpu_seconds())


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """The run of one dtype."""

    dtype: str
    plan: Plan
    out: Results
    say: Callable[[str], None]

    def measure_start_up(self, group: Sequence[Target]) -> None:
        """Seconds from the start of a process to its first token of a short prompt."""
        failed: set[str] = set()
        for round_ in range(self.plan.rounds):
            for target in rotated(group, round_):
                if target.name in failed:
                    continue
                with tempfile.TemporaryDirectory() as cache:
                    metrics = ["start_up_s"]
                    if target.compiles:  # the second start finds what the first one compiled
                        metrics.insert(0, "start_up_empty_cache_s")
                    for metric in metrics:
                        try:
                            self.add(target, round_, {metric: self.start_up(target, cache)})
                        except _ERRORS as error:
                            failed.add(target.name)
                            self.fail(target, START_UP, round_, error)
                            break

    def start_up(self, target: Target, cache: str) -> float:
        """One start; `cache` is the folder of compiled programs where the target has any."""
        prompt = list(self.plan.token_ids[: self.plan.sizes.start_up_prompt])
        names = ("KVJAX_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR") if target.compiles else ()
        env: dict[str, str] = dict.fromkeys(names, cache)
        with self.worker(target, env) as worker:
            worker.load(**({"warm_up": False} if target.compiles else {}))
            worker.generate([prompt], 1)
            return time.perf_counter() - worker.started

    def measure_cases(self, group: Sequence[Target]) -> None:
        """Loads every target, then runs the cases on them in turn."""
        stream = TokenStream(self.plan.token_ids)
        untimed = self.plan.warm_up_prompts(stream)
        with contextlib.ExitStack() as stack:
            workers = []
            for target in group:
                worker = stack.enter_context(self.worker(target))
                try:
                    self.load(worker, untimed)
                    workers.append(worker)
                except _ERRORS as error:
                    worker.close()
                    self.fail(target, "load", None, error)
            for case in self.plan.timed_cases:
                for round_ in range(self.plan.rounds):
                    prompts = CASES[case].prompts(self.plan.sizes, stream)
                    self.measure_round(workers, case, round_, prompts, untimed)
            for worker in workers:
                mib = worker.peak_rss_mib() if worker.alive else 0.0
                if mib:
                    self.add(worker.target, None, {"peak_rss_mib": mib})

    def measure_round(
        self,
        workers: Sequence[Worker],
        case: str,
        round_: int,
        prompts: list[list[int]],
        untimed: list[list[int]],
    ) -> None:
        """One case, once on each living worker, with the same prompts."""
        tokens: dict[str, list[int]] = {}
        for worker in rotated([worker for worker in workers if worker.alive], round_):
            try:
                with worker.running():
                    worker.generate([untimed[-1]], 2)  # caches and threads come back, untimed
                    worker.reset()
                    with _OtherCores(worker) as others:
                        measured = CASES[case].measure(worker, prompts, self.plan.sizes)
            except _ERRORS as error:
                self.fail(worker.target, case, round_, error)
            else:
                self.add(worker.target, round_, {**measured.values, **others.values})
                if measured.token_ids is not None:
                    tokens[worker.target.name] = measured.token_ids
        names = [w.target.name for w in workers if w.target.name in tokens]
        for worker in workers:
            if worker.target.name in names[1:]:
                same = common_length(tokens[names[0]], tokens[worker.target.name])
                self.add(worker.target, round_, {"same_tokens": same})

    def load(self, worker: Worker, untimed: list[list[int]]) -> None:
        """Loads and warms up a worker, notes what it is and what it uses when idle; pauses it."""
        one, long, *batch = untimed
        with worker.running():
            answer = worker.load()
            described = worker.ask("about")["about"]
            warm_up(worker, one, long, batch)
            before = worker.cpu_seconds()
            time.sleep(IDLE_SECONDS)
            idle = (worker.cpu_seconds() - before) / IDLE_SECONDS
        about = self.out.manifest.setdefault("targets", {}).setdefault(worker.target.name, {})
        about["versions"] = answer["versions"]
        if described is not None:
            about.setdefault("engine", {})[self.dtype] = described
        about.setdefault("idle_cores_before_pause", {})[self.dtype] = round(idle, 2)
        self.add(worker.target, None, {"load_s": answer["seconds"]})

    def worker(self, target: Target, env: Mapping[str, str] | None = None) -> Worker:
        """A started process, with its log in the log folder."""
        folder = self.plan.log_folder
        log = None if folder is None else folder / f"{target.name}-{self.dtype}.log"
        return Worker(target, timeout_s=self.plan.timeout_s, log=log, extra_env=env)

    def add(self, target: Target, round_: int | None, values: Mapping[str, float]) -> None:
        """Keeps values on disk, then says them."""
        for metric, value in values.items():
            self.out.add(target.name, self.dtype, metric, value)
        self.out.save()
        for metric, value in values.items():
            turn = "" if round_ is None else f" round {round_ + 1}"
            self.say(f"{self.dtype} {target.name} {metric}{turn}: {value:.3f}")

    def fail(self, target: Target, case: str, round_: int | None, error: Exception) -> None:
        """Keeps an error on disk and says it."""
        self.out.fail(target.name, self.dtype, case, round_, error)
        self.out.save()
        self.say(f"{self.dtype} {target.name} {case} failed: {error}")
