"""Rounds of a serving benchmark: every target with the same requests, one after the other."""

import asyncio
import contextlib
import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from kvjax.benchmarks.client import Record, Target, drive
from kvjax.benchmarks.engine_manifest import Counters
from kvjax.benchmarks.figures import METRICS, details, figures
from kvjax.benchmarks.interleave import rotated
from kvjax.benchmarks.workloads import Request
from kvjax.progress import progress_bar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is sent in each round and when, and which figures are made of it."""

    rounds: Sequence[Sequence[Request]]
    times: Sequence[Sequence[float]]
    warm_ups: Sequence[Request] = ()
    max_concurrency: int | None = None
    percentiles: Sequence[float] = (99,)
    metrics: Sequence[str] = tuple(METRICS)  # those with percentiles
    goodput: dict[str, float] = dataclasses.field(default_factory=dict)
    texts: bool = False


@dataclasses.dataclass
class Side:
    """A target, and the records of its rounds so far."""

    target: Target
    engine: Any = None  # of a target in this process
    before: Counters | None = None  # its counters when it was ready
    peak_mib: Callable[[], float | None] | None = None  # of a target in a process of its own
    turn: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    failure: str = ""  # why it takes no part in further rounds
    rounds: list[tuple[list[Record], float]] = dataclasses.field(default_factory=list)

    def add(self, records: list[Record], seconds: float) -> None:
        """Keeps a round; its times go on from the end of the round before."""
        before = sum(duration for _, duration in self.rounds)
        for record in records:
            record.sent += before
        self.rounds.append((records, seconds))

    def result(self, plan: Plan) -> dict[str, Any]:
        """Figures over all rounds, of each round, the details, and what the engine counted."""
        records = [record for mine, _ in self.rounds for record in mine]
        duration = sum(seconds for _, seconds in self.rounds)
        found = self._figures(plan, records, duration)
        found["rounds"] = [self._figures(plan, *one) for one in self.rounds]
        found["peak_rss_mib"] = self._peak_mib()
        if self.engine is not None and self.before is not None:
            added = Counters.of(self.engine).since(self.before)
            found |= {**added, "compile_seconds": self.before.compile_seconds}
            found["programs"] = self.before.compiles
        return {**found, **details(records, plan.texts)}

    def _figures(self, plan: Plan, records: Sequence[Record], duration: float) -> dict[str, Any]:
        found = figures(records, duration, percentiles=plan.percentiles, goodput=plan.goodput)
        silent = [m for m in METRICS if m not in plan.metrics]
        left_out = {f"p{p:g}_{m}_ms" for p in plan.percentiles for m in silent}
        return {key: value for key, value in found.items() if key not in left_out}

    def _peak_mib(self) -> float | None:
        if self.peak_mib is not None:
            return self.peak_mib()
        if self.engine is None:
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


async def run_rounds(
    sides: Sequence[Side],
    plan: Plan,
    save: Callable[[], None],
    check: Callable[[Side, Sequence[Request]], None] | None = None,
) -> None:
    """Warms every side up, then runs the rounds, in an order that rotates; `save` after each,
    and before it `check`, which may give a side a `failure`.

    Cancelled, it leaves what was finished of the round under way, too.
    """
    for side in sides:
        with side.turn():
            await drive(side.target, plan.warm_ups, [0.0] * len(plan.warm_ups), [])
    for number, (requests, times) in enumerate(zip(plan.rounds, plan.times, strict=True)):
        for side in rotated([side for side in sides if not side.failure], number):
            with side.turn():
                await side.target.reset()
                await _run_one(side, requests, times, plan.max_concurrency)
            if check is not None:
                check(side, requests)
            save()


async def _run_one(
    side: Side, requests: Sequence[Request], times: Sequence[float], cap: int | None
) -> None:
    records: list[Record] = []
    start = time.perf_counter()
    with progress_bar(sys.stderr.isatty(), len(requests)) as bar:

        def finished(record: Record) -> None:
            bar.count(record.input_len, record.cached or 0, record.output_len)

        try:
            seconds = await drive(
                side.target, requests, times, records, max_concurrency=cap, finished=finished
            )
        except asyncio.CancelledError:
            side.add(records, time.perf_counter() - start)
            raise
    side.add(records, seconds)
