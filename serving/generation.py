"""An answer that is generated: admitted, run, worded, sent - whole, or event by event.

One response class for all endpoints that generate. An endpoint brings the prompts and a `Wording`.
"""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncGenerator, AsyncIterator
from collections.abc import Sequence as Seq
from typing import Any, Protocol

from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from kvjax.errors import StepFailed
from kvjax.request import RequestOutput, SamplingParams
from kvjax.serving.errors import APIError, api_error
from kvjax.serving.keys import ANYBODY
from kvjax.serving.marking import Marked
from kvjax.serving.metrics import TokenClock
from kvjax.serving.service import Service
from kvjax.sessions import Keep


@dataclasses.dataclass(frozen=True)
class Job:
    """One prompt of a request, ready for the engine."""

    prompt: Marked
    params: SamplingParams
    text: str | None = None  # of the prompt, where the endpoint knows it


class Wording(Protocol):
    """How an endpoint words its answers."""

    def events(self, job: int, output: RequestOutput) -> bytes:
        """What a snapshot of prompt number `job` adds to the stream; empty if nothing."""
        ...

    def closing(self, outputs: Seq[RequestOutput]) -> bytes:
        """The last events of a stream, before `[DONE]`."""
        ...

    def whole(self, outputs: Seq[RequestOutput]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        ...


class Disconnected(Exception):
    """The client has left; nobody needs an answer."""


class Generation(Response):
    """Runs the jobs while it answers. Leaving early, however it happens, aborts them."""

    def __init__(
        self,
        service: Service,
        answer_id: str,
        jobs: list[Job],
        wording: Wording,
        *,
        stream: bool,
        keep: Keep | None = None,
    ) -> None:
        super().__init__()
        self._service, self._id, self._jobs = service, answer_id, jobs
        self._wording, self._stream, self._keep = wording, stream, keep
        self._newest: list[RequestOutput | None] = [None] * len(jobs)
        self._headers, self._tenant = Headers(), ANYBODY.name
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers. What fails before the first byte has a status of its own, later an event."""
        self._headers, self._tenant = Headers(scope=scope), scope["kvjax.tenant"].name
        try:
            completions = sum(job.params.n for job in self._jobs)
            with self._service.admission.enter(completions):
                async with until_disconnected(receive):
                    await self._in_time(send)
        except Disconnected:
            return
        except Exception as error:
            told = api_error(error, scope.get("kvjax.request_id", self._id))
            if not self._started:
                await told.response()(scope, receive, send)
                return
            body = event(told.body) + _DONE
            await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _in_time(self, send: Send) -> None:
        seconds = self._service.config.request_timeout
        try:
            async with asyncio.timeout(seconds):
                await (self._send_events(send) if self._stream else self._send_whole(send))
        except TimeoutError:
            raise APIError(504, f"not done within {seconds:g} seconds", code="timeout") from None

    async def _send_events(self, send: Send) -> None:
        async with contextlib.aclosing(self._outputs()) as outputs:
            async for index, output in outputs:
                body = self._wording.events(index, output)
                if body:
                    await self._start(send)
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        await self._start(send)
        body = self._wording.closing(self._finals()) + _DONE
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _start(self, send: Send) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})

    async def _send_whole(self, send: Send) -> None:
        async with contextlib.aclosing(self._outputs()) as outputs:
            async for _ in outputs:
                pass
        response = JSONResponse(self._wording.whole(self._finals()))
        self._started = True
        await response({"type": "http"}, _nothing, send)

    def _finals(self) -> list[RequestOutput]:
        return [output for output in self._newest if output is not None]

    # ---- running ----------------------------------------------------------------------------

    async def _outputs(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Snapshots of all jobs, with the job's number, as they come."""
        if len(self._jobs) == 1:
            async with contextlib.aclosing(self._run(0)) as outputs:
                async for output in outputs:
                    yield 0, output
            return
        queue: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue(1)

        async def run(index: int) -> None:
            end = None
            try:
                async with contextlib.aclosing(self._run(index)) as outputs:
                    async for output in outputs:
                        await queue.put((index, output))
            except Exception as error:
                end = error
            await queue.put(end)

        tasks = [asyncio.create_task(run(index)) for index in range(len(self._jobs))]
        try:
            going = len(tasks)
            while going:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    going -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, index: int) -> AsyncGenerator[RequestOutput, None]:
        """Snapshots of one job; the last one is final. Raises the request's own error."""
        job, metrics = self._jobs[index], self._service.metrics
        clock, output = TokenClock(metrics), None
        prompt: dict[str, Any] = {"prompt_token_ids": job.prompt.ids}
        if job.prompt.spans:
            prompt["chunk_spans"] = job.prompt.spans
        request_id = f"{self._id}-{index}"
        outputs = self._service.llm.generate(prompt, job.params, request_id, self._keep)
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    self._newest[index] = output
                    clock.see(output)
                    if output.finished:
                        if any(c.finish_reason == "abort" for c in output.outputs):
                            raise APIError(503, "the request was aborted", code="aborted")
                        metrics.finish(output, job.params)
                        self._service.reports.add(self._tenant, self._id, index, output)
                        if self._service.tracing is not None:
                            self._service.tracing.finish(output, job.params, self._headers)
                    yield output
        except StepFailed:
            metrics.finished.labels("error").inc()
            raise
        except (GeneratorExit, asyncio.CancelledError):
            if output is None or not output.finished:
                metrics.finished.labels("abort").inc(job.params.n)
            raise


@contextlib.asynccontextmanager
async def until_disconnected(receive: Receive) -> AsyncIterator[None]:
    """Cancels the block when the client leaves, and raises `Disconnected` in its place."""
    task, left = asyncio.current_task(), False
    assert task is not None

    async def watch() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if left and task.uncancel() == 0:
            raise Disconnected from None
        raise
    finally:
        watcher.cancel()


async def _nothing() -> Any:
    return {"type": "http.disconnect"}


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return (
        b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )


_DONE = b"data: [DONE]\n\n"
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
