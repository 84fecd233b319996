"""Hugging Face transformers: eager PyTorch, scaled-dot-product attention."""
# pyright: reportMissingImports=false

import asyncio
import copy
import time

PAGE = 256  # tokens: its own default
BATCH = 512  # tokens of a step: attention is over all keys of the batch, and 2048 was slower


class Target:
    """Batches are equally long prompts in one tensor, in a plain prefill and decode loop.

    Streams run one after the other, as in `transformers serve`; with `batching` through what
    `--continuous-batching` is made of there, over `kv_gib` of paged KV with prefix sharing.
    """

    packages = ("transformers", "torch", "numpy")

    def __init__(
        self,
        model: str,
        dtype: str,
        threads: int,
        streams: bool = False,
        batching: bool = False,
        max_num_seqs: int = 8,
        kv_gib: int = 2,
        **sizes: int,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        del sizes  # its longest sequence is what its memory holds
        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        self.kept: tuple[list[int], object] | None = None
        self.count = 0
        self.manager = self._manager(max_num_seqs, kv_gib) if streams and batching else None
        self.stream = self._one_by_one if self.manager is None else self._batched

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

    def _one_by_one(self, prompt: list[int], max_tokens: int):
        """Greedy: a list of one new id after each step."""
        torch = self.torch
        cache, skip = self._cache_for([prompt])
        ids = torch.tensor([prompt[skip:]])
        for _ in range(max_tokens):
            with torch.inference_mode():
                out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            yield [int(ids[0, 0])]

    async def _batched(self, prompt: list[int], max_tokens: int):
        """Greedy, batched with the requests under way: new ids as they come."""
        assert self.manager is not None
        outputs: asyncio.Queue = asyncio.Queue()
        self.count += 1
        name = str(self.count)
        self.manager.register_result_handler(name, outputs.put_nowait)
        self.manager.add_request(
            prompt, request_id=name, max_new_tokens=max_tokens, streaming=True, eos_token_id=-1
        )
        known, finished = 0, False
        while not finished:
            output = await outputs.get()
            if output.error is not None:
                raise RuntimeError(output.error)
            finished = output.is_finished()
            if ids := output.generated_tokens[known:]:
                known += len(ids)
                yield [int(t) for t in ids]

    def keep_prefix(self, tokens: list[int]) -> None:
        """Computes and keeps the KV of `tokens` for prompts that begin with them."""
        from transformers import DynamicCache

        with self.torch.inference_mode():
            cache = DynamicCache(config=self.model.config)
            ids = self.torch.tensor([tokens])
            self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.kept = (tokens, cache)

    def reset(self) -> None:
        """Drops the kept prefix, and the pages of a server without requests."""
        self.kept = None
        if self.manager is not None and self.manager.batch_processor is not None:
            self.manager.batch_processor.cache.reset()

    def _manager(self, max_num_seqs: int, kv_gib: int):
        from transformers import ContinuousBatchingConfig, GenerationConfig

        config, item = self.model.config, self.model.dtype.itemsize
        token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * item
        manager = self.model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=kv_gib * 2**30 // (PAGE * token),
                max_batch_tokens=BATCH,
                max_requests_per_batch=max_num_seqs,
            ),
        )
        manager.start()
        return manager

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
