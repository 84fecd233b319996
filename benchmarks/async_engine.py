"""`AsyncLLM` with the calls of `LLM` that the throughput benchmark makes: all prompts at once."""

import asyncio
from collections.abc import Sequence
from typing import Any

from kvjax.async_llm import AsyncLLM


class AsyncEngine:
    """An engine in a thread of its own, driven from an event loop that runs only in calls."""

    def __init__(self, model: str, **settings: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._llm = AsyncLLM(model, compile_when_idle=False, **settings)
        self.engine = self._llm.engine
        self.get_tokenizer = self._llm.get_tokenizer

    def warm_up(self) -> None:
        """Compiles every program."""
        self._loop.run_until_complete(self._llm.call(self.engine.runner.warm_up))

    def reset_prefix_cache(self) -> None:
        """Forgets cached prefixes."""
        self._loop.run_until_complete(self._llm.reset_prefix_cache())

    def generate(self, prompts: Any, params: Any) -> list[Any]:
        """The final outputs, in the order of the prompts; one prompt may stand alone."""
        if not isinstance(params, Sequence):
            prompts, params = [prompts], [params]

        async def last(prompt: Any, one: Any) -> Any:
            return [output async for output in self._llm.generate(prompt, one)][-1]

        async def every() -> list[Any]:
            return await asyncio.gather(*map(last, prompts, params))

        return self._loop.run_until_complete(every())

    def close(self) -> None:
        """Ends the engine's thread."""
        self._llm.shutdown()
        self._loop.close()
