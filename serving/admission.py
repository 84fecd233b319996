"""How much work is let in, and when nothing is any more."""

import asyncio
import contextlib
import math
import time
from collections.abc import Iterator

from kvjax.serving.errors import APIError


class Admission:
    """Counts completions from admission to their end. For the event loop's thread only.

    `capacity` run at once; `max_queue` more may wait. One request by itself always gets in, however
    many completions it asks for.
    """

    def __init__(self, capacity: int, max_queue: int) -> None:
        self.capacity, self.max_queue = capacity, max_queue
        self.in_flight = 0
        self.draining = False
        self._seconds = 1.0  # a completion takes, smoothed
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def enter(self, completions: int) -> Iterator[None]:
        """Lets a request in, or raises 429 (the queue is full) or 503 (the server is leaving)."""
        if self.draining:
            headers = {"Retry-After": "5", "Connection": "close"}
            raise APIError(503, "the server is shutting down", code="draining", headers=headers)
        limit = self.capacity + self.max_queue
        if self.in_flight and self.in_flight + completions > limit:
            waits = (self.in_flight + completions - limit) * self._seconds / self.capacity
            raise APIError(
                429,
                f"{self.in_flight} completions run or wait, {completions} more are over "
                f"max_queue={self.max_queue}",
                code="queue_full",
                headers={"Retry-After": str(min(60, max(1, math.ceil(waits))))},
            )
        self.in_flight += completions
        self._idle.clear()
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds += 0.1 * (time.monotonic() - start - self._seconds)
            self.in_flight -= completions
            if not self.in_flight:
                self._idle.set()

    async def drain(self, timeout: float) -> bool:
        """Lets nobody in any more and waits for those inside; False if time ran out."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True
