"""OpenVINO GenAI, reading a GGUF directly."""
# pyright: reportMissingImports=false

import time


class Target:
    """`LLMPipeline` over its continuous-batching scheduler, prefix caching on, 2 GiB of KV."""

    packages = ("openvino", "openvino-genai", "openvino-tokenizers", "numpy")

    def __init__(
        self, model: str, dtype: str, threads: int, streams: bool = False, **sizes
    ) -> None:
        if streams:
            raise NotImplementedError("its scheduler is not reached request by request here")
        import openvino_genai as genai

        hints = {"float32": "f32", "bfloat16": "bf16"}  # int8: only weights; the default hint stays
        hint = {"INFERENCE_PRECISION_HINT": hints[dtype]} if dtype in hints else {}
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 2  # GiB
        scheduler.enable_prefix_caching = True
        self.genai = genai
        self.pipe = genai.LLMPipeline(
            model,
            "CPU",
            scheduler_config=scheduler,
            INFERENCE_NUM_THREADS=threads,
            **hint,
        )

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict:
        """Greedy; the first-token time of one prompt is when its streamer is first called."""
        import numpy as np
        import openvino as ov

        config = self.genai.GenerationConfig(
            max_new_tokens=max_tokens, ignore_eos=True, do_sample=False
        )
        ids = np.asarray(prompts, np.int64)
        inputs = self.genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        start = time.perf_counter()
        if len(prompts) > 1:
            return {"token_ids": [list(t) for t in self.pipe.generate(inputs, config).tokens]}
        first_token = FirstToken(self.genai)
        result = self.pipe.generate(inputs, config, first_token.streamer)
        first = first_token.time
        return {
            "token_ids": [list(t) for t in result.tokens],
            "first_token_s": None if first is None else [first - start],
        }


class FirstToken:
    """Notes when the first token came."""

    def __init__(self, genai) -> None:
        self.time: float | None = None
        noted, running = self, genai.StreamingStatus.RUNNING

        class Streamer(genai.StreamerBase):
            def write(self, token):
                if noted.time is None:
                    noted.time = time.perf_counter()
                return running

            def end(self):
                pass

        self.streamer = Streamer()
