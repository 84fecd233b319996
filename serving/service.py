"""The state of one server: its engine, who may use it, how it is doing."""

import asyncio
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from kvjax.async_llm import AsyncLLM
from kvjax.request import SamplingParams, StructuredOutputs
from kvjax.reuse import Strategy
from kvjax.serving.admission import Admission
from kvjax.serving.config import ServeConfig
from kvjax.serving.errors import APIError
from kvjax.serving.keys import Keys
from kvjax.serving.metrics import Metrics
from kvjax.serving.put_chunks import PutChunks
from kvjax.serving.refusals import Refusals
from kvjax.serving.reports import Reports
from kvjax.serving.tracing import Tracing

Health = Literal["loading", "ok", "draining", "hung", "dead"]

_INLINE_CHARACTERS = 16_384  # a longer text is tokenised beside the event loop


class Service:
    """What the routes share. Belongs to the event loop's thread; the engine has its own."""

    def __init__(self, config: ServeConfig, model: str) -> None:
        self.config = config
        self.model = config.served_model_name or model
        self.created = int(time.time())
        self.keys = Keys.read(Path(config.api_key_file)) if config.api_key_file else None
        self.metrics = Metrics()
        endpoint = config.otlp_endpoint
        self.tracing = Tracing(endpoint, self.model) if endpoint else None
        self.admission = Admission(1, config.max_queue)
        self.refusals = Refusals(config.max_refusals)
        self.put_chunks = PutChunks()
        self.reports = Reports()
        self._llm: AsyncLLM | None = None
        self._ids = itertools.count()
        self._tokenizing = asyncio.Lock()

    def open(self, llm: AsyncLLM) -> None:
        """Takes requests from now on. The engine is warm."""
        self._llm = llm
        self.admission.capacity = llm.engine.limits.max_num_seqs
        self.metrics.attach(llm, self.model)

    @property
    def llm(self) -> AsyncLLM:
        """The engine; raises 503 while there is none."""
        if self._llm is None:
            headers = {"Retry-After": "5"}
            raise APIError(503, "the model is being loaded", code="loading", headers=headers)
        return self._llm

    @property
    def is_open(self) -> bool:
        """Whether there is an engine."""
        return self._llm is not None

    @property
    def health(self) -> Health:
        """How the server is doing: `hung` if a step takes too long, `dead` without an engine."""
        if self._llm is None:
            return "loading"
        if not self._llm.is_alive:
            return "dead"
        started = self._llm.step_started
        if started is not None and time.monotonic() - started > self.config.step_timeout:
            return "hung"
        return "draining" if self.admission.draining else "ok"

    def check_model(self, name: str | None) -> None:
        """Raises 404 for a model that is not served here; no name means the one that is."""
        if name is not None and name != self.model:
            raise APIError(
                404, f"the model {name!r} is not served here; {self.model!r} is",
                code="model_not_found", param="model",
            )  # fmt: skip

    def next_id(self, prefix: str) -> str:
        """An id for an answer, unlike any other of this server."""
        return f"{prefix}-{self.created:x}{next(self._ids):08x}"

    async def compile_grammar(self, params: SamplingParams) -> None:
        """Compiles what the answer must be, beside the event loop: it can take a second."""
        asked = params.structured_outputs
        if isinstance(asked, StructuredOutputs):
            await asyncio.to_thread(self.llm.grammars.matcher, asked)

    async def check_reuse(self, spec: str | None) -> Strategy | None:
        """The reuse strategy that a request asks for, if it may serve this model; else 400.

        Beside the event loop: which model that is, its weights say.
        """
        if spec is None:
            return None
        try:
            return await asyncio.to_thread(self.llm.strategy, spec)
        except ValueError as error:
            raise APIError(400, str(error), code="reuse_refused", param="reuse") from None

    async def beside(self, size: int, work: Callable[[], list[int]]) -> list[int]:
        """Tokenises: at once what is short, else in a thread, one long text at a time."""
        if size <= _INLINE_CHARACTERS:
            return work()
        async with self._tokenizing:
            return await asyncio.to_thread(work)
