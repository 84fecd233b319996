"""Rounds of a serving benchmark: every target with the same requests, one after the other."""

import asyncio
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvjax.benchmarks import bounds
from kvjax.benchmarks.bounds import Work
from kvjax.benchmarks.client import Record, Target, drive
from kvjax.benchmarks.engine_manifest import Counters
from kvjax.benchmarks.figures import METRICS, QUEUE_METRICS, details, figures, probed
from kvjax.benchmarks.interleave import rotated
from kvjax.benchmarks.workers import WorkerFailed
from kvjax.benchmarks.workloads import Part, Request
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
    bars: bool = True
    probe_rate: float = 0.0  # one-token requests per second beside the load


@dataclasses.dataclass
class Side:
    """A target, and the records of its rounds so far."""

    target: Target
    before: Counters | None = None  # of its engine when it was ready
    count: Callable[[], Counters] | None = None  # the same now
    memory: Callable[[], Mapping[str, float | None]] = dict  # its peak, by the keys of the result
    turn: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    work: Work | None = None  # what a token costs it
    ceilings: Mapping[str, float] | None = None  # of its device
    failure: str = ""  # why it takes no part in further rounds
    counted: Counters | None = None  # after its last round
    rounds: list[tuple[list[Record], float]] = dataclasses.field(default_factory=list)
    probes: list[Record] = dataclasses.field(default_factory=list)

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
        found |= {"peak_rss_mib": None, **self.memory()}
        steps = None
        if self.counted is not None and self.before is not None:
            added = self.counted.since(self.before)
            found |= {**added, "compile_seconds": self.before.compile_seconds}
            found["programs"], steps = self.before.compiles, added["steps"]
        if self.work is not None and self.ceilings is not None and duration > 0:
            found |= bounds.shares(self.work, self.ceilings, _sequences(records), duration, steps)
        return {**found, **probed(self.probes), **details(records, plan.texts)}

    def _figures(self, plan: Plan, records: Sequence[Record], duration: float) -> dict[str, Any]:
        queue = [m for m in QUEUE_METRICS if m in plan.metrics and plan.max_concurrency]
        found = figures(
            records, duration, percentiles=plan.percentiles, goodput=plan.goodput, queue=queue
        )
        silent = [m for m in METRICS if m not in plan.metrics]
        left_out = {f"p{p:g}_{m}_ms" for p in plan.percentiles for m in silent}
        return {key: value for key, value in found.items() if key not in left_out}


def _sequences(records: Sequence[Record]) -> list[bounds.Sequence]:
    """What was computed for the requests that were finished; moved tokens are not run."""
    return [
        bounds.Sequence(
            prompt=r.input_len,
            known=min((r.cached or 0) + (r.shifted or 0.0), r.input_len),
            output=r.output_len // r.completions,
            completions=r.completions,
        )
        for r in records
        if not r.error and r.output_len >= r.completions
    ]


async def run_rounds(
    sides: Sequence[Side],
    plan: Plan,
    save: Callable[[], None],
    check: Callable[[Side, Sequence[Request]], None] | None = None,
) -> None:
    """Warms every side up, then runs the rounds, in an order that rotates; `save` after each,
    and before it `check`, which may give a side a `failure`, or note the one that it has.

    Cancelled, it leaves what was finished of the round under way, too.
    """
    for side in sides:
        with side.turn():
            await drive(side.target, plan.warm_ups, [0.0] * len(plan.warm_ups), [])
    for number, (requests, times) in enumerate(zip(plan.rounds, plan.times, strict=True)):
        for side in rotated([side for side in sides if not side.failure], number):
            try:
                with side.turn():
                    await side.target.reset()
                    await _run_one(side, requests, times, plan)
            except WorkerFailed as error:
                side.failure = str(error)
            if check is not None:
                check(side, requests)
            save()


async def _run_one(
    side: Side, requests: Sequence[Request], times: Sequence[float], plan: Plan
) -> None:
    records: list[Record] = []
    start = time.perf_counter()
    with progress_bar(plan.bars and sys.stderr.isatty(), len(requests)) as bar:

        def finished(record: Record) -> None:
            bar.count(record.input_len, record.cached or 0, record.output_len)

        probes = asyncio.create_task(_probe(side, requests[0], plan.probe_rate))
        try:
            seconds = await drive(
                side.target,
                requests,
                times,
                records,
                max_concurrency=plan.max_concurrency,
                finished=finished,
            )
        except asyncio.CancelledError:
            side.add(records, time.perf_counter() - start)
            raise
        finally:
            probes.cancel()
    if side.count is not None:
        side.counted = side.count()
    side.add(records, seconds)


async def _probe(side: Side, like: Request, rate: float) -> None:
    """One token after another, at a steady rate at most; those under way at the end are dropped."""
    if rate <= 0:
        return
    first = like.parts[0]
    part = Part(token_ids=first.token_ids[:1]) if first.token_ids else Part("Hello")
    while True:
        due = asyncio.create_task(asyncio.sleep(1 / rate))
        found: list[Record] = []
        await drive(side.target, [Request((part,), 1)], [0.0], found)
        side.probes += found
        await due
