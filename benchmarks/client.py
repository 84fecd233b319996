"""Sends a workload to a target and notes when what came back: the client of the serving benchmark.

Times are those of vLLM's benchmark: TTFT from sending to the first streamed output, ITL the gaps
between streamed outputs, E2EL from sending to the last of them, all in seconds here.
"""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from kvjax.benchmarks.workloads import Part, Request


@dataclasses.dataclass(slots=True)
class Record:
    """What became of one request. Of a failed one, `error` says why, and the rest is as it was."""

    sent: float = 0.0  # after the start of the run
    queued: float = 0.0  # time that the concurrency cap held it back, before `sent`
    ttft: float | None = None
    itl: list[float] = dataclasses.field(default_factory=list)
    e2el: float | None = None
    input_len: int = 0
    output_len: int = 0  # over all completions
    completions: int = 1
    text: str = ""  # of the first completion
    token_ids: tuple[int, ...] = ()  # the same, where the target tells them
    cached: int | None = None  # prompt tokens whose KV was reused exactly; None: not told
    shifted: float | None = None  # moved from other positions, averaged over layers
    recomputed: float | None = None  # stored, but run again
    error: str = ""


class Stopwatch:
    """Notes the streamed outputs of one request, from its making on."""

    def __init__(self, record: Record) -> None:
        self._record, self._start = record, time.perf_counter()
        self._last = self._start

    def output(self) -> None:
        """Something was streamed."""
        now = time.perf_counter()
        if self._record.ttft is None:
            self._record.ttft = now - self._start
        else:
            self._record.itl.append(now - self._last)
        self._last = now
        self._record.e2el = now - self._start


class Target(Protocol):
    """What is measured."""

    name: str

    async def send(self, parts: Sequence[Part], request: Request, record: Record) -> None:
        """Runs one prompt, its quoted answers filled in, and fills `record`; raises if it fails."""
        ...

    async def reset(self) -> None:
        """Forgets cached prefixes, if the target can."""
        ...

    async def close(self) -> None:
        """Ends what was started for the target."""
        ...


async def drive(
    target: Target,
    requests: Sequence[Request],
    times: Sequence[float],
    records: list[Record],
    *,
    max_concurrency: int | None = None,
    finished: Callable[[Record], None] = lambda record: None,
) -> float:
    """Sends each request at its time, not before the answers that it quotes; returns the seconds.

    `records` gets one record per request at once, filled as they come, so that a cancelled run
    leaves what it has: records with neither `e2el` nor `error` were not finished.
    """
    if max_concurrency is not None and max_concurrency < 1:
        raise ValueError(f"max_concurrency must be at least 1, got {max_concurrency}")
    mine = [Record(completions=request.n) for request in requests]
    records += mine
    slots = asyncio.Semaphore(max_concurrency or max(1, len(requests)))
    over = [asyncio.Event() for _ in requests]
    start = time.perf_counter()

    async def one(number: int) -> None:
        request, record = requests[number], mine[number]
        await asyncio.sleep(max(0.0, start + times[number] - time.perf_counter()))
        for earlier in request.after:
            await over[earlier].wait()
        due = time.perf_counter()
        async with slots:
            record.sent = time.perf_counter() - start
            record.queued = time.perf_counter() - due
            try:
                await target.send(_filled(request, mine), request, record)
                if record.e2el is None:
                    record.error = "nothing was generated"
            except Exception as error:
                record.error = str(error) or type(error).__name__
        over[number].set()
        finished(record)

    async with asyncio.TaskGroup() as group:
        for number in range(len(requests)):
            group.create_task(one(number))
    return time.perf_counter() - start


def _filled(request: Request, records: Sequence[Record]) -> list[Part]:
    """The prompt with the answers that it quotes: as ids where they are known, else as text."""
    parts = []
    for part in request.parts:
        if part.output_of is not None:
            answer = records[part.output_of]
            if answer.error:
                raise ValueError(f"the answer that it quotes failed: {answer.error}")
            if not answer.text and not answer.token_ids:
                continue
            part = Part(answer.text) if answer.text else Part(token_ids=answer.token_ids)
        parts.append(part)
    return parts
