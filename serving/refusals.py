"""Refused requests are answered at a bounded rate: bad clients wait, and not the good ones."""

import time
from collections.abc import Callable

_BURST = 1.0  # seconds' worth of refusals that may come at once
_LONGEST = 2.0  # seconds that an answer waits at most


class Refusals:
    """Says how long the answer to a refused request waits. For the event loop's thread only.

    A client that sends its next request when it has the answer to the last is slowed down by that,
    whatever it sends, and has its connection counted meanwhile. Few refusals are never delayed.
    """

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._spacing, self._clock = 1 / per_second, clock
        self._next = clock() - _BURST  # when an answer may leave without haste

    def delay(self) -> float:
        """Counts a refusal; seconds until its answer may leave."""
        now = self._clock()
        self._next = min(max(self._next, now - _BURST) + self._spacing, now + _LONGEST)
        return max(0.0, self._next - now)
