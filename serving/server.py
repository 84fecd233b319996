"""A server's life: listening, loading, ready, draining, gone."""

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from kvjax.async_llm import AsyncLLM
from kvjax.serving.app import create_app
from kvjax.serving.config import ServeConfig
from kvjax.serving.connections import connection_class
from kvjax.serving.service import Service

log = logging.getLogger("kvjax.serving")

_SWITCH = 0.0005  # seconds for which the engine's thread may keep the event loop from the GIL
_WATCH = 1.0  # seconds between two looks at the engine
_LEFTOVERS = 5  # seconds that connections have to close once no request runs


class Server(uvicorn.Server):
    """uvicorn's server, and the engine behind it.

    The first SIGTERM or SIGINT lets running requests finish and refuses new ones; a second one
    ends the process at once.
    """

    def __init__(self, model: str | Path, config: ServeConfig, engine: dict[str, Any]) -> None:
        self.service = Service(config, str(model))
        self._model, self._engine, self._limits = model, engine, config
        app = create_app(self.service)
        self._hub = app.state.hub
        settings = uvicorn.Config(
            app,
            http=connection_class(config, self.service.refusals),
            ws="none",
            lifespan="off",
            loop="uvloop",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=int(config.keep_alive_timeout),
            timeout_graceful_shutdown=_LEFTOVERS,
        )
        super().__init__(settings)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._signals = 0
        self.port: int | None = None  # once it listens

    def run_until_stopped(self) -> None:
        """Serves until a signal. Raises what kept the model from being loaded."""
        sys.setswitchinterval(_SWITCH)
        with listen(self._limits.host, self._limits.port) as listener:
            uvicorn_loop = self.config.get_loop_factory()
            with asyncio.Runner(loop_factory=uvicorn_loop) as runner:
                runner.run(self._run(listener))
        if self._failure is not None:
            raise self._failure

    async def _run(self, listener: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self.port = listener.getsockname()[1]
        self._start(self._load())
        self._start(self._watch())
        await self.serve(sockets=[listener])
        for task in self._tasks:
            task.cancel()
        if self.service.is_open:
            await asyncio.to_thread(self.service.llm.shutdown)
        if self.service.tracing is not None:
            await asyncio.to_thread(self.service.tracing.shutdown)

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self) -> None:
        """Loads and compiles while `/health` already answers; then says that it is ready."""
        start = time.monotonic()
        try:
            llm = await asyncio.to_thread(
                AsyncLLM, self._model, compile_when_idle=False, **self._engine
            )
            loaded = time.monotonic()
            await llm.call(llm.engine.runner.warm_up)
        except Exception as error:
            self._failure, self.should_exit = error, True
            return
        self.service.open(llm)
        host, compiled = self._limits.host, llm.engine.runner.compiles
        address = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        print(
            f"kvjax: ready: {self.service.model} at {address} (loaded in {loaded - start:.1f} s, "
            f"{compiled} programs in {time.monotonic() - loaded:.1f} s)",
            flush=True,
        )

    async def _watch(self) -> None:
        """Says when a step hangs, or goes on after all."""
        before = self.service.health
        while True:
            await asyncio.sleep(_WATCH)
            now = self.service.health
            if now != before and "hung" in (now, before):
                log.error("a step %s", "hangs" if now == "hung" else "that hung is over")
            if now == "dead" and before != "dead":
                log.error("the engine is gone; /health says so")
            before = now

    # ---- the end ----------------------------------------------------------------------------

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first drains, the second ends."""
        self._signals += 1
        if self._signals > 1:
            print("kvjax: stopped at once", file=sys.stderr, flush=True)
            os._exit(128 + sig)  # a thread inside XLA would keep an orderly end waiting
        assert self._loop is not None
        name = signal.Signals(sig).name
        self._loop.call_soon_threadsafe(lambda: self._start(self._drain(name)))

    async def _drain(self, why: str) -> None:
        running = self.service.admission.in_flight
        log.info("%s: %d completions finish, nothing new is taken", why, running)
        if not await self.service.admission.drain(self._limits.drain_timeout):
            log.warning(
                "%d completions did not finish within %g s",
                self.service.admission.in_flight, self._limits.drain_timeout,
            )  # fmt: skip
        self._hub.close()
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `OSError` with the address in its message."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen at {host}:{port}: {error.strerror}") from None
