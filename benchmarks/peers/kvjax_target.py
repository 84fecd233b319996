"""kvjax itself, as a user calls it."""
# pyright: reportMissingImports=false

import asyncio
from typing import Any


class Target:
    """`kvjax.LLM` with every bucket compiled at load (not for a start-up measurement)."""

    packages = ("kvjax", "jax", "jaxlib", "flax", "numpy")

    def __init__(
        self,
        model: str,
        dtype: str,
        warm_up: bool = True,
        llm_options: dict[str, Any] | None = None,
        streams: bool = False,
    ) -> None:
        self.streams, self.llm = streams, self._load(model, dtype, warm_up, llm_options, streams)

    def _load(
        self,
        model: str,
        dtype: str,
        warm_up: bool,
        llm_options: dict[str, Any] | None,
        streams: bool,
    ) -> Any:
        sizes = {"max_model_len": 4096, "max_num_seqs": 8, "max_num_batched_tokens": 512}
        options = {"dtype": dtype, **sizes, **(llm_options or {})}
        if streams:
            from kvjax import AsyncLLM

            served = AsyncLLM(model, compile_when_idle=False, **options)
            asyncio.run(served.call(served.engine.runner.warm_up))
            return served
        from kvjax import LLM

        llm = LLM(model, **options)
        if warm_up:
            llm.warm_up()
        return llm

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict:
        """Greedy; first-token times count from the arrival of each request."""
        from kvjax import SamplingParams

        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        outputs = self.llm.generate(prompts, params)
        return {
            "token_ids": [[int(t) for t in out.outputs[0].token_ids] for out in outputs],
            "first_token_s": [out.metrics and out.metrics.time_to_first_token for out in outputs],
            "cached_tokens": [int(out.num_cached_tokens) for out in outputs],
        }

    async def stream(self, prompt: list[int], max_tokens: int):
        """Greedy, batched with the requests under way: new ids as they come."""
        from kvjax import SamplingParams

        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        known = 0
        async for out in self.llm.generate(prompt, params):
            ids = out.outputs[0].token_ids
            if len(ids) > known:
                yield [int(t) for t in ids[known:]]
                known = len(ids)
            if out.finished:
                yield int(out.num_cached_tokens)

    def about(self) -> dict[str, Any]:
        """The engine's part of a manifest."""
        from kvjax.benchmarks import engine_manifest

        return engine_manifest.of_engine(self.llm.engine, self.llm.get_tokenizer())

    def counters(self) -> dict[str, Any]:
        """`engine_manifest.Counters`, by name."""
        import dataclasses

        from kvjax.benchmarks.engine_manifest import Counters

        return dataclasses.asdict(Counters.of(self.llm.engine))

    def reset(self) -> None:
        """Empties the prefix cache."""
        done = self.llm.reset_prefix_cache()
        if self.streams:
            asyncio.run(done)
