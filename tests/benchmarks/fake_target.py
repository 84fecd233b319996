"""A target with known delays, for the tests of the engine benchmark (run through worker.py)."""

import os
import time


class Target:
    packages = ("pip",)

    def __init__(
        self,
        dtype="float32",
        per_prompt_token=0.0,
        per_step=0.0,
        short_by=0,
        fail_on_batch=False,
        fail_on_new=None,
        refuse="",
        die_after=None,
        hang=False,
        load=0.0,
        first_token=True,
        journal="",
        warm_up=True,
        streams=False,
    ):
        if refuse:
            raise NotImplementedError(refuse)
        time.sleep(load)
        self.per_prompt_token, self.per_step = per_prompt_token, per_step
        self.short_by, self.fail_on_batch, self.die_after = short_by, fail_on_batch, die_after
        self.fail_on_new = fail_on_new
        self.hang, self.first_token, self.journal = hang, first_token, journal
        self.kept: list[int] = []
        self.calls = 0
        print("noise on stdout must not reach the protocol")

    def stream(self, prompt, max_tokens):
        time.sleep(len(prompt) * self.per_prompt_token)
        for step in range(max_tokens - self.short_by):
            if step == self.fail_on_new:
                raise RuntimeError("this token breaks")
            time.sleep(self.per_step if step else 0)
            yield [step]
        yield 2  # tokens of the prompt were cached

    def generate(self, prompts, max_tokens):
        self.calls += 1
        if self.die_after is not None and self.calls > self.die_after:
            os._exit(3)
        if self.hang:
            time.sleep(60)
        if self.fail_on_batch and len(prompts) > 1:
            raise RuntimeError("batches break here")
        if max_tokens == self.fail_on_new:
            raise RuntimeError("long answers break here")
        start = time.perf_counter()
        skip = len(self.kept) if self.kept and prompts[0][: len(self.kept)] == self.kept else 0
        time.sleep(sum(len(p) - skip for p in prompts) * self.per_prompt_token)
        first = time.perf_counter() - start
        time.sleep((max_tokens - 1) * self.per_step)
        self.note(start, time.perf_counter())
        num = max(0, max_tokens - self.short_by)
        reply: dict[str, list] = {
            "token_ids": [[(sum(p) + i) % 97 for i in range(num)] for p in prompts]
        }
        if self.first_token:
            reply["first_token_s"] = [first] * len(prompts)
        return reply

    def keep_prefix(self, tokens):
        self.kept = tokens

    def reset(self):
        self.kept = []

    def note(self, start, stop):
        if self.journal:
            with open(self.journal, "a") as file:
                print(start, stop, file=file)
