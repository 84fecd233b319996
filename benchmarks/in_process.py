"""The serving benchmark's target in this process: `AsyncLLM`, called directly."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvjax.async_llm import AsyncLLM
from kvjax.benchmarks import engine_manifest
from kvjax.benchmarks.client import Record, Stopwatch
from kvjax.benchmarks.engine_manifest import Counters
from kvjax.benchmarks.workloads import Part, Request
from kvjax.request import Chunk, RequestOutput, SamplingParams


class InProcess:
    """An engine with every program compiled. `sampling` are fields of `SamplingParams`.

    With `reuse`, the passages of prompts are marked as chunks and served by that strategy.
    """

    name = "kvjax"

    def __init__(
        self,
        model: str,
        settings: Mapping[str, Any],
        sampling: Mapping[str, Any] | None = None,
        reuse: str | None = None,
    ) -> None:
        self.llm = AsyncLLM(model, compile_when_idle=False, **settings)
        self._sampling = {"temperature": 0.0, "ignore_eos": True, **(sampling or {})}
        self._reuse = reuse

    async def warm_up(self) -> Counters:
        """Compiles everything; the engine's counters afterwards."""
        await self.llm.call(self.llm.engine.runner.warm_up)
        return Counters.of(self.llm.engine)

    def about(self) -> dict[str, Any]:
        """The engine's part of the manifest."""
        return engine_manifest.of_engine(self.llm.engine, self.llm.get_tokenizer())

    async def send(self, parts: Sequence[Part], request: Request, record: Record) -> None:
        params = SamplingParams(
            max_tokens=request.max_tokens, n=request.n, reuse=self._reuse, **self._sampling
        )
        prompt, watch = self._prompt(parts), Stopwatch(record)
        async for output in self.llm.generate(prompt, params):
            count = sum(len(completion.token_ids) for completion in output.outputs)
            if count > record.output_len:
                watch.output()
                record.output_len = count
            if output.finished:
                _finish(record, output)

    async def reset(self) -> None:
        await self.llm.reset_prefix_cache()
        await self.llm.call(self.llm.engine.chunks.forget)

    @contextlib.asynccontextmanager
    async def profile(self, folder: Path) -> AsyncIterator[None]:
        """jax's profiler runs meanwhile; its trace goes to `folder`."""
        import jax

        jax.profiler.start_trace(str(folder))
        try:
            yield
        finally:
            jax.profiler.stop_trace()

    async def close(self) -> None:
        await asyncio.to_thread(self.llm.shutdown)

    def _prompt(self, parts: Sequence[Part]) -> Any:
        if self._reuse is not None and any(part.passage for part in parts):
            return [
                Chunk(part.text or part.token_ids) if part.passage else part.text or part.token_ids
                for part in parts
            ]
        if all(part.text for part in parts):
            return "".join(part.text for part in parts)
        tokenizer, ids = self.llm.get_tokenizer(), []
        for number, part in enumerate(parts):
            ids += part.token_ids or tokenizer.encode(part.text, add_special_tokens=number == 0)
        return ids


def _finish(record: Record, output: RequestOutput) -> None:
    if output.error is not None:
        raise output.error
    record.input_len = len(output.prompt_token_ids)
    record.text, record.token_ids = output.outputs[0].text, output.outputs[0].token_ids
    record.cached, report = output.num_cached_tokens, output.reuse
    record.shifted = record.recomputed = 0.0
    if report is not None:
        record.cached = math.floor(report.exact)
        record.shifted = report.shifted + report.patched
        record.recomputed = report.recomputed
