"""Batches of any length: requests enter the engine as others leave it."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from kvjax.engine import Engine
from kvjax.intake import Intake, Prompt
from kvjax.request import RequestOutput, SamplingParams
from kvjax.sequence import Request

Job = tuple[Any, Prompt, SamplingParams]  # a key of the caller's, and what to run
Result = tuple[
    Any, RequestOutput | ValueError
]  # the key, and what came of it or why it was refused

_WINDOW = 8  # requests in hand per sequence of a step: enough for the scheduler to pair prefixes


@dataclasses.dataclass(slots=True, eq=False)
class _Slot:
    """One job in hand."""

    key: Any
    request: Request | None
    result: RequestOutput | ValueError | None = None


def run_stream(
    engine: Engine, intake: Intake, jobs: Iterable[Job], *, ordered: bool, window: int | None = None
) -> Iterator[Result]:
    """Runs `jobs`, of which at most `window` are held at a time; results as they finish.

    `ordered` holds results back until all earlier ones are out; they count towards the window.
    A refused job gives a `ValueError` in its place. Leaving the iteration aborts what still runs.
    """
    window = window or _WINDOW * engine.limits.max_num_seqs
    source, more = iter(jobs), True
    held: collections.deque[_Slot] = collections.deque()  # in the order of the jobs
    running: set[_Slot] = set()
    try:
        while more or held:
            while more and len(held) < window:
                job = next(source, None)
                if job is None:
                    more = False
                    break
                slot = _accept(engine, intake, job)
                held.append(slot)
                if slot.request is not None:
                    running.add(slot)
            if running:
                engine.step()
            for slot in held:  # not what the step touched: another loop may have taken that
                if slot.result is None and slot.request is not None and slot.request.finished:
                    slot.result = intake.output(slot.request)
                    running.discard(slot)
            yield from _finished(held, ordered)
    finally:
        for slot in running:
            if slot.request is not None:
                engine.abort(slot.request)


def _accept(engine: Engine, intake: Intake, job: Job) -> _Slot:
    key, prompt, params = job
    try:
        request = intake.request(prompt, params)
    except ValueError as error:
        return _Slot(key, None, error)
    engine.add(request)
    return _Slot(key, request)


def _finished(held: collections.deque[_Slot], ordered: bool) -> Iterator[Result]:
    """Takes out of `held` what may be handed on."""
    ready = []
    for slot in held:
        if slot.result is not None:
            ready.append(slot)
        elif ordered:
            break
    for slot in ready:
        held.remove(slot)
        assert slot.result is not None
        yield slot.key, slot.result
