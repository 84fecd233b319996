"""`AsyncLLM`: the engine in a thread of its own, streams of outputs in front of it."""

import asyncio
import collections
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from kvjax.build import build, tensor_parallel_mesh
from kvjax.config import EngineConfig
from kvjax.errors import KVJaxError
from kvjax.intake import Prompt
from kvjax.models.tokenizers import Tokenizer
from kvjax.request import RequestOutput, SamplingParams
from kvjax.sequence import Request


@dataclasses.dataclass(eq=False)
class _Stream:
    """Where one request's outputs go: a queue of the caller's event loop."""

    request: Request
    loop: asyncio.AbstractEventLoop
    queue: "asyncio.Queue[RequestOutput | BaseException]"

    def send(self, item: RequestOutput | BaseException) -> None:
        """Puts an output on the queue, from the engine's thread."""
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:  # the caller's loop is closed: nobody listens any more
            return


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
        config = dataclasses.replace(config or EngineConfig(), **settings)
        mesh = mesh if mesh is not None else tensor_parallel_mesh(tensor_parallel_size)
        built = build(model, config, mesh)
        self.engine, self._intake = built.engine, built.intake
        self._tokenizer = built.tokenizer
        self._compiles = compile_when_idle
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._streams: dict[str, _Stream] = {}  # engine thread only
        self._wake = threading.Condition()
        self._stopping = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name="kvjax-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Streams snapshots of one request, the last with `finished`.

        Leaving the iteration aborts the request. Raises `ValueError` for bad input before any
        device work, and the request's own error if it fails.
        """
        params = sampling_params or SamplingParams()
        request = self._intake.request(prompt, params, request_id=request_id)
        stream = _Stream(request, asyncio.get_running_loop(), asyncio.Queue())
        self._call(lambda: self._add(stream))
        finished = False
        try:
            while not finished:
                item = await stream.queue.get()
                while not stream.queue.empty() and isinstance(item, RequestOutput):
                    item = stream.queue.get_nowait()  # snapshots are cumulative: take the newest
                if isinstance(item, BaseException):
                    finished = True
                    raise item
                finished = item.finished
                yield item
        finally:
            if not finished:
                self._call(lambda: self._abort(request.request_id))

    async def abort(self, request_id: str) -> None:
        """Ends a request; its stream closes with `finish_reason == "abort"`."""
        self._call(lambda: self._abort(request_id))

    async def call(self, fn: Callable[[], Any]) -> Any:
        """Runs `fn()` in the engine's thread between two steps, for whatever must not race it."""
        loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def run() -> None:
            try:
                result = fn()
                loop.call_soon_threadsafe(future.set_result, result)
            except Exception as error:
                loop.call_soon_threadsafe(future.set_exception, error)

        self._call(run)
        return await future

    async def reset_prefix_cache(self) -> int:
        """Forgets cached prefixes; the number of pages that became free."""
        return await self.call(self.engine.reset_prefix_cache)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    def shutdown(self) -> None:
        """Ends the thread; open streams close with an error. Blocks until the current step is done."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    # ---- engine thread ----------------------------------------------------------------------

    def _call(self, fn: Callable[[], None]) -> None:
        with self._wake:
            if self._stopping or not self._thread.is_alive():
                raise KVJaxError("the engine is shut down") from self._error
            self._calls.append(fn)
            self._wake.notify()

    def _add(self, stream: _Stream) -> None:
        request_id = stream.request.request_id
        if request_id in self._streams:
            stream.send(ValueError(f"request id {request_id!r} is in use"))
            return
        self._streams[request_id] = stream
        self.engine.add(stream.request)

    def _abort(self, request_id: str) -> None:
        stream = self._streams.pop(request_id, None)
        if stream is not None and not stream.request.finished:
            self.engine.abort(stream.request)
            stream.send(self._intake.output(stream.request))

    def _loop(self) -> None:
        error: BaseException = KVJaxError("the engine was shut down")
        try:
            while not self._stopping:
                while self._calls:
                    self._calls.popleft()()
                if self.engine.has_work:
                    self._publish(self.engine.step())
                elif not (self._compiles and self.engine.runner.compile_next()):
                    with self._wake:
                        self._wake.wait_for(lambda: self._calls or self._stopping)
        except BaseException as failure:
            self._error = error = failure
            raise
        finally:
            self._stopping = True
            for stream in self._streams.values():
                stream.send(error)

    def _publish(self, requests: list[Request]) -> None:
        for request in requests:
            stream = self._streams.get(request.request_id)
            if stream is None or stream.request is not request:
                continue
            if request.error is not None:
                stream.send(request.error)
            else:
                stream.send(self._intake.output(request, streaming=not request.finished))
            if request.finished:
                del self._streams[request.request_id]
