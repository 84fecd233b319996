"""`/v1/kv/*`: what the prefix cache holds, forgetting it, and a stream of its changes."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from kvjax.cache.events import BlockEvents, Event
from kvjax.engine import Engine
from kvjax.errors import KVJaxError
from kvjax.serving.generation import Disconnected, event, until_disconnected
from kvjax.serving.service import Service

_BEHIND = 4096  # events that a subscriber may lag behind before it is dropped
_HEARTBEAT = 15.0  # seconds between comments on a quiet stream


def stats(engine: Engine) -> dict[str, Any]:
    """Counts of pages, cache and queues. For the engine's thread: they agree with each other."""
    scheduler = engine.scheduler
    pool, tree = scheduler.pool, scheduler.tree
    held = {page for s in (*scheduler.running, *scheduler.waiting) for page in s.page_ids}
    pinned = {page for s in engine.parked for page in s.page_ids} - held
    counts = tree.stats if tree is not None else None
    tokens = counts.query_tokens if counts else 0
    return {
        "pages": {
            "total": pool.num_pages,
            "free": pool.num_free,
            "cached_only": pool.num_pages - pool.num_free - len(held) - len(pinned),
            "held": len(held),
            "pinned": len(pinned),
            "page_size": pool.page_size,
        },
        "prefix_cache": {
            "enabled": tree is not None,
            "tokens": tree.num_cached_tokens if tree else 0,
            "pages": tree.num_pages if tree else 0,
            "queries": counts.queries if counts else 0,
            "query_tokens": tokens,
            "hit_tokens": counts.hit_tokens if counts else 0,
            "hit_rate": counts.hit_tokens / tokens if counts and tokens else 0.0,
            "inserted_tokens": counts.inserted_tokens if counts else 0,
            "evicted_pages": counts.evicted_pages if counts else 0,
        },
        "chunks": dataclasses.asdict(engine.chunks.stats),
        "requests": {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "preemptions": scheduler.num_preemptions,
        },
    }


class EventHub:
    """Hands cache events to subscribers. Without any, the cache is not watched at all."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._queues: set[asyncio.Queue[Event | None]] = set()

    @contextlib.asynccontextmanager
    async def subscription(self) -> AsyncIterator["asyncio.Queue[Event | None]"]:
        """A queue that begins with what is cached now. None in it is the end."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        llm, loop = self._service.llm, asyncio.get_running_loop()
        tree = llm.engine.scheduler.tree
        if tree is None:
            raise ValueError("prefix caching is off: there are no events")

        def publish(change: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(self._push, queue, change)

        observer = BlockEvents(llm.engine.spec.page_size, publish)

        def join() -> None:
            for known in observer.snapshot(tree):
                loop.call_soon_threadsafe(queue.put_nowait, known)
            tree.observers.append(observer)

        self._queues.add(queue)
        try:
            await llm.call(join)
            yield queue
        finally:
            self._queues.discard(queue)
            with contextlib.suppress(KVJaxError):  # the engine is gone, and its tree with it
                await llm.call(lambda: tree.observers.remove(observer))

    def close(self) -> None:
        """Ends every stream."""
        for queue in self._queues:
            queue.put_nowait(None)

    def _push(self, queue: "asyncio.Queue[Event | None]", change: Event) -> None:
        if queue not in self._queues:
            return
        queue.put_nowait(change)
        if queue.qsize() > _BEHIND:  # it comes back, and gets a snapshot
            self._queues.discard(queue)
            queue.put_nowait(None)


class EventStream(Response):
    """Server-sent events of the hub until the client leaves, lags too far behind, or we stop."""

    def __init__(self, hub: EventHub, *, snapshot_only: bool = False) -> None:
        super().__init__()
        self._hub, self._snapshot_only = hub, snapshot_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Streams."""
        async with self._hub.subscription() as queue:
            if self._snapshot_only:
                queue.put_nowait(None)
            headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                async with until_disconnected(receive):
                    await self._send(queue, send)
            except Disconnected:
                return
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, queue: "asyncio.Queue[Event | None]", send: Send) -> None:
        while True:
            body = b": still here\n\n"
            with contextlib.suppress(TimeoutError):
                change = await asyncio.wait_for(queue.get(), _HEARTBEAT)
                if change is None:
                    return
                body = event(change)
            await send({"type": "http.response.body", "body": body, "more_body": True})
