"""`AsyncLLM`: the engine in a thread of its own, streams of outputs in front of it."""

import asyncio
import atexit
import collections
import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from kvjax.async_chunk_library import AsyncChunkLibrary
from kvjax.build import build, tensor_parallel_mesh
from kvjax.chunk_library import ChunkLibrary
from kvjax.config import EngineConfig
from kvjax.errors import KVJaxError
from kvjax.grammar import Grammars
from kvjax.intake import Prompt
from kvjax.models.tokenizers import Tokenizer
from kvjax.request import RequestOutput, SamplingParams
from kvjax.reuse import Strategy
from kvjax.sequence import Request
from kvjax.sessions import Keep, Sessions


@dataclasses.dataclass(eq=False)
class _Stream:
    """Where one request's outputs go. Snapshots are cumulative, so only the newest is kept."""

    request: Request
    loop: asyncio.AbstractEventLoop
    news: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    newest: RequestOutput | BaseException | None = None
    keep: Keep | None = None

    def send(self, item: RequestOutput | BaseException) -> bool:
        """Hands an output over, from the engine's thread; whether anybody can still listen."""

        return _call_soon(self.loop, lambda: self.deliver(item))

    def deliver(self, item: RequestOutput | BaseException) -> None:
        """The same from the loop's own thread."""
        self.newest = item
        self.news.set()

    async def receive(self) -> RequestOutput:
        """The newest output not seen yet; raises what was sent instead of one."""
        await self.news.wait()
        self.news.clear()
        if isinstance(self.newest, BaseException):
            raise self.newest
        assert self.newest is not None
        return self.newest


_News = tuple[_Stream, RequestOutput | BaseException]


def _deliver(items: list[_News]) -> None:
    for stream, item in items:
        stream.deliver(item)


# Work for the engine's thread. It is called with None, or with why it cannot be done any more.
_Call = Callable[[BaseException | None], None]


class AsyncLLM:
    """Serves concurrent callers. Arguments are those of `LLM`.

    The thread steps while there is work; when idle it compiles the programs that are still
    missing, one at a time, and then sleeps.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        config: EngineConfig | None = None,
        tensor_parallel_size: int = 1,
        mesh: Mesh | None = None,
        compile_when_idle: bool = True,
        **settings: Any,
    ) -> None:
        config = (config or EngineConfig()).replaced(settings)
        mesh = mesh if mesh is not None else tensor_parallel_mesh(tensor_parallel_size)
        built = build(model, config, mesh)
        self.engine, self._intake = built.engine, built.intake
        self._tokenizer = built.tokenizer
        self.chunks = AsyncChunkLibrary(
            ChunkLibrary(built.engine, built.intake, lambda: built.checkpoint.fingerprint),
            self.call,
        )
        self._compiles = compile_when_idle
        self.sessions = Sessions(self.engine)  # for the engine's thread: use `call`
        self.engine.reclaim = self.sessions.drop_oldest
        self._calls: collections.deque[_Call] = collections.deque()
        self._streams: dict[str, _Stream] = {}  # engine thread only
        self._wake = threading.Condition()
        self._stopping = False
        self._error: BaseException | None = None
        self.step_started: float | None = None  # `time.monotonic()`; None: no step is under way
        self.on_step: Callable[[], None] | None = None  # called after each, in the engine's thread
        self._thread = threading.Thread(target=self._loop, name="kvjax-engine", daemon=True)
        self._thread.start()
        atexit.register(self.shutdown)  # the interpreter must not go away under a step

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        keep: Keep | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Streams snapshots of one request, the last with `finished`.

        With `keep`, the KV of its first completion then stays for the session's next request.
        Leaving the iteration aborts the request. Raises `ValueError` for bad input before any
        device work, and the request's own error if it fails.
        """
        params = sampling_params or SamplingParams()
        request = self._intake.request(prompt, params, request_id=request_id)
        stream = _Stream(request, asyncio.get_running_loop(), keep=keep)
        self._call(lambda error: self._add(stream, error))
        finished = False
        try:
            while not finished:
                output = await stream.receive()
                finished = output.finished
                yield output
        finally:
            if not finished:
                with contextlib.suppress(KVJaxError):  # shut down: nothing is left to abort
                    self._call(lambda error: self._abort(stream, error))

    async def abort(self, request_id: str) -> None:
        """Ends a request; its stream closes with `finish_reason == "abort"`."""
        self._call(lambda error: self._abort(self._streams.get(request_id), error))

    async def call(self, fn: Callable[[], Any]) -> Any:
        """Runs `fn()` in the engine's thread between two steps, for whatever must not race it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def finish(result: Any, error: BaseException | None) -> None:
            if future.done():  # the caller was cancelled
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def run(error: BaseException | None) -> None:
            result = None
            if error is None:
                try:
                    result = fn()
                except Exception as raised:
                    error = raised
            _call_soon(loop, lambda: finish(result, error))

        self._call(run)
        return await future

    async def reset_prefix_cache(self) -> int:
        """Forgets cached prefixes; the number of pages that became free."""
        return await self.call(self.engine.reset_prefix_cache)

    def strategy(self, spec: Any) -> Strategy:
        """The reuse strategy of a spec, if it may serve this model. It may read the weights: not
        for an event loop.

        Raises:
          UnknownStrategy, ReuseRefused, ValueError: it may not, or there is no such strategy.
        """
        return self._intake.strategy(spec)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread is there to take requests."""
        return self._thread.is_alive() and not self._stopping

    @property
    def max_model_len(self) -> int:
        """The longest prompt and output together, in tokens."""
        return self._intake.max_model_len

    @property
    def grammars(self) -> Grammars:
        """What compiles structured outputs; a grammar compiled before costs a request nothing."""
        return self._intake.grammars

    def shutdown(self) -> None:
        """Ends the thread; open streams close with an error. Blocks while a step is under way."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()
        atexit.unregister(self.shutdown)

    # ---- engine thread ----------------------------------------------------------------------

    def _call(self, fn: _Call) -> None:
        with self._wake:
            if self._stopping or not self._thread.is_alive():
                raise KVJaxError("the engine is shut down") from self._error
            self._calls.append(fn)
            self._wake.notify()

    def _add(self, stream: _Stream, error: BaseException | None) -> None:
        request_id = stream.request.request_id
        if error is None and request_id in self._streams:
            error = ValueError(f"request id {request_id!r} is in use")
        if error is not None:
            stream.send(error)
            return
        self._streams[request_id] = stream
        stream.request.sequences[0].keeps_pages = stream.keep is not None
        self.engine.add(stream.request)

    def _abort(self, stream: _Stream | None, error: BaseException | None) -> None:
        """Ends a stream's request, unless it is over or was refused."""
        if stream is None or error is not None:
            return
        if self._streams.get(stream.request.request_id) is stream:
            del self._streams[stream.request.request_id]
            self.engine.abort(stream.request)
            self._keep(stream)
            stream.send(self._intake.output(stream.request))

    def _keep(self, stream: _Stream) -> None:
        """A request is over: its session, if any, takes what it has computed."""
        if stream.keep is not None:
            self.sessions.keep(stream.keep, stream.request.sequences[0])

    def _loop(self) -> None:
        error: BaseException = KVJaxError("the engine was shut down")
        try:
            while not self._stopping:
                while self._calls and not self._stopping:
                    self._calls.popleft()(None)
                next_end = self.sessions.expire()
                if self.engine.has_work:
                    self.step_started = time.monotonic()
                    touched = self.engine.step()
                    self.step_started = None
                    self._publish(touched)
                    if self.on_step is not None:
                        self.on_step()
                elif not (self._compiles and self.engine.runner.compile_next()):
                    with self._wake:
                        self._wake.wait_for(lambda: self._calls or self._stopping, next_end)
        except BaseException as failure:
            self._error = error = failure
            raise
        finally:
            with self._wake:
                self._stopping = True  # from here on nothing is queued
            while self._calls:
                self._calls.popleft()(error)
            for stream in self._streams.values():
                stream.send(error)

    def _publish(self, requests: list[Request]) -> None:
        """Hands over what a step has brought: one call per loop, or waking it costs the most."""
        news: dict[asyncio.AbstractEventLoop, list[_News]] = {}
        for request in requests:
            stream = self._streams.get(request.request_id)
            if stream is None or stream.request is not request:
                continue
            item = request.error or self._intake.output(request, streaming=not request.finished)
            news.setdefault(stream.loop, []).append((stream, item))
            if request.finished:
                del self._streams[request.request_id]
                self._keep(stream)
        for loop, items in news.items():
            if not _call_soon(loop, functools.partial(_deliver, items)):  # the loop is closed
                for stream, _ in items:
                    self._abort(stream, None)


def _call_soon(loop: asyncio.AbstractEventLoop, fn: Callable[[], None]) -> bool:
    """Runs `fn` in a loop of another thread; False if that loop is closed."""
    try:
        loop.call_soon_threadsafe(fn)
    except RuntimeError:
        return False
    return True
