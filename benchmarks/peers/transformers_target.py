"""Hugging Face transformers: eager PyTorch, scaled-dot-product attention, a dynamic cache."""
# pyright: reportMissingImports=false

import copy
import time


class Target:
    """A plain prefill and decode loop; batches are equally long prompts in one tensor."""

    packages = ("transformers", "torch", "numpy")

    def __init__(self, model: str, dtype: str, threads: int, streams: bool = False) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        del streams  # it can always stream
        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        self.kept: tuple[list[int], object] | None = None

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict:
        """Greedy; a kept prefix is copied, repeated over the batch and not run again."""
        torch = self.torch
        start = time.perf_counter()
        if len({len(prompt) for prompt in prompts}) != 1:
            raise NotImplementedError("prompts of unequal length in one batch")
        cache, skip = self._cache_for(prompts)
        with torch.inference_mode():
            ids = torch.tensor([prompt[skip:] for prompt in prompts])
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            step = out.logits[:, -1].argmax(-1, keepdim=True)
            tokens = [step]
            first = time.perf_counter() - start
            for _ in range(max_tokens - 1):
                out = self.model(step, past_key_values=out.past_key_values, use_cache=True)
                step = out.logits[:, -1].argmax(-1, keepdim=True)
                tokens.append(step)
            token_ids = torch.cat(tokens, dim=1).tolist()
        num = len(prompts)
        return {
            "token_ids": token_ids,
            "first_token_s": [first] * num,
            "cached_tokens": [skip] * num,
        }

    def stream(self, prompt: list[int], max_tokens: int):
        """Greedy, one request at a time: a list of one new id after each step."""
        torch = self.torch
        cache, skip = self._cache_for([prompt])
        ids = torch.tensor([prompt[skip:]])
        for _ in range(max_tokens):
            with torch.inference_mode():
                out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            yield [int(ids[0, 0])]

    def keep_prefix(self, tokens: list[int]) -> None:
        """Computes and keeps the KV of `tokens` for prompts that begin with them."""
        from transformers import DynamicCache

        with self.torch.inference_mode():
            cache = DynamicCache(config=self.model.config)
            ids = self.torch.tensor([tokens])
            self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.kept = (tokens, cache)

    def reset(self) -> None:
        """Drops the kept prefix."""
        self.kept = None

    def _cache_for(self, prompts: list[list[int]]) -> tuple[object, int]:
        from transformers import DynamicCache

        if self.kept is not None:
            tokens, cache = self.kept
            if all(len(p) > len(tokens) and p[: len(tokens)] == tokens for p in prompts):
                copied = copy.deepcopy(cache)
                if len(prompts) > 1:
                    copied.batch_repeat_interleave(len(prompts))  # type: ignore[attr-defined]
                return copied, len(tokens)
        return DynamicCache(config=self.model.config), 0
