"""`AsyncLLM.chunks`: the chunk library of an engine that runs in a thread of its own."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from kvjax.cache.chunks import ChunkStats
from kvjax.chunk_library import ChunkInfo, ChunkLibrary, Documents, LoadedChunks, PutChunk
from kvjax.request import Chunk


class Call(Protocol):
    """`AsyncLLM.call`."""

    def __call__(self, fn: Callable[[], Any]) -> Awaitable[Any]: ...


class AsyncChunkLibrary:
    """`ChunkLibrary` for callers in event loops. Its methods do, and raise, what those do there.

    Saving and loading keep the engine's thread: requests wait meanwhile.
    """

    _POLL_SECONDS = 0.02

    def __init__(self, library: ChunkLibrary, call: Call) -> None:
        """`call` runs a function in the engine's thread."""
        self._library, self._call = library, call

    async def put(
        self, documents: Documents, *, strategy: Any = None, cache_salt: str | None = None
    ) -> tuple[PutChunk, ...]:
        """Encodes documents beside what else the engine does."""
        library = self._library
        jobs = waiting = await self._call(lambda: library.begin(documents, strategy, cache_salt))
        while waiting := await self._call(lambda: library.unfinished(waiting)):
            # Asked, not told: a call also fails when the engine's thread has ended.
            await asyncio.sleep(self._POLL_SECONDS)
        return await self._call(lambda: library.outcome(jobs))

    async def stats(self) -> ChunkStats:
        """What is stored under any salt, and counts so far."""
        return await self._call(lambda: self._library.stats)

    async def list(self, cache_salt: str | None = None) -> tuple[ChunkInfo, ...]:
        """The chunks of one salt."""
        return await self._call(lambda: self._library.list(cache_salt))

    async def pin(self, chunk: str | Chunk, cache_salt: str | None = None) -> int:
        """Keeps a chunk from being evicted."""
        return await self._call(lambda: self._library.pin(chunk, cache_salt))

    async def unpin(self, chunk: str | Chunk, cache_salt: str | None = None) -> int:
        """Takes a `pin` back."""
        return await self._call(lambda: self._library.unpin(chunk, cache_salt))

    async def delete(self, chunk: str | Chunk, cache_salt: str | None = None) -> int:
        """Forgets a chunk."""
        return await self._call(lambda: self._library.delete(chunk, cache_salt))

    async def save(self, path: str | Path) -> int:
        """Writes every stored chunk to a file."""
        return await self._call(lambda: self._library.save(path))

    async def load(self, path: str | Path, cache_salts: Sequence[str] = ()) -> LoadedChunks:
        """Stores the chunks of a file: those without a salt, and those of the salts named."""
        return await self._call(lambda: self._library.load(path, cache_salts))
