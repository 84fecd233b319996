"""Sessions: conversations whose KV stays on the device between two turns, for a stated time.

A session holds the pages of the sequence that its last request ended with. The next request finds
them as it finds any cached prefix; they just cannot be evicted before the time is over.
"""

import dataclasses

from kvjax.engine import Engine
from kvjax.sequence import Sequence

_SHARE = 0.5  # of all pages that sessions may hold: the oldest goes first
_MOST = 4096  # sessions


@dataclasses.dataclass(frozen=True, slots=True)
class Keep:
    """That a request belongs to a session, and how long its KV is to stay afterwards."""

    key: tuple[str, str]  # the tenant, and the id
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class SessionInfo:
    """One session as it stands."""

    key: tuple[str, str]
    num_tokens: int  # whose KV is held
    num_pages: int
    seconds_left: float


class Sessions:
    """The sessions of one engine. For the engine's thread only."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._held: dict[
            tuple[str, str], tuple[Sequence, float]
        ] = {}  # the oldest first; when it is over

    def keep(self, keep: Keep, sequence: Sequence) -> None:
        """Holds the pages of a sequence that was parked, in place of what the session held."""
        self.forget(keep.key)
        self._held[keep.key] = (sequence, self._engine.clock() + keep.seconds)
        limit = _SHARE * self._engine.scheduler.pool.num_pages
        while len(self._held) > _MOST or self.num_pages > limit:
            self.drop_oldest()

    def forget(self, key: tuple[str, str]) -> bool:
        """Gives a session's pages back; whether there was one."""
        held = self._held.pop(key, None)
        if held is not None:
            self._engine.discard(held[0])
        return held is not None

    def drop_oldest(self) -> bool:
        """Gives the pages of the session that was used least recently back, if there is one."""
        return bool(self._held) and self.forget(next(iter(self._held)))

    def expire(self) -> float | None:
        """Forgets those whose time is over; seconds until the next one, None without any."""
        now = self._engine.clock()
        for key in [key for key, (_, end) in self._held.items() if end <= now]:
            self.forget(key)
        return min((end - now for _, end in self._held.values()), default=None)

    @property
    def num_pages(self) -> int:
        """Distinct pages that are held."""
        return len({page for sequence, _ in self._held.values() for page in sequence.page_ids})

    def describe(self) -> list[SessionInfo]:
        """All sessions."""
        now = self._engine.clock()
        return [
            SessionInfo(key, s.num_computed, len(s.page_ids), max(0.0, end - now))
            for key, (s, end) in self._held.items()
        ]
