"""Prompts of chunks over the tiny model, and what must hold of any strategy that runs all again."""

import functools
from typing import Any

import numpy as np

from kvjax import LLM, SamplingParams
from kvjax.request import Chunk
from tests.tiny_model import tiny

SYSTEM = "You are terse. "
FIRST, SECOND, THIRD = "the keeper is Farid, ", "his code is 4817; ", "prices are in crowns. "
QUESTION = "what is the keeper's code?"


@functools.cache
def reuse_llm() -> Any:
    """An engine for the reuse tests of one process; each test starts with empty caches."""
    return tiny(LLM, fresh=True, num_pages=128, max_model_len=256)


def fresh_llm() -> Any:
    llm = reuse_llm()
    llm.engine.chunks.store.clear()
    llm.reset_prefix_cache()
    return llm


def prompts() -> dict[str, list[Any]]:
    """Prompts that every strategy has to get right."""
    a, b, c = Chunk(FIRST), Chunk(SECOND), Chunk(THIRD)
    return {
        "chunks": [SYSTEM, a, b, QUESTION],
        "order": [SYSTEM, b, c, a, QUESTION],
        "text between": [SYSTEM, a, " and ", b, QUESTION],
        "twice": [a, b, a, QUESTION],
        "one token": [SYSTEM, Chunk("x"), a, Chunk("y"), QUESTION],
        "no question": [SYSTEM, a, b],
        "short question": [a, b, "?"],
        "chunk only": [a],
    }


def answer(llm: Any, prompt: Any, reuse: Any = None, **extra: Any) -> Any:
    """One output of four greedy tokens with the log-probabilities of the twenty best."""
    params = SamplingParams(
        temperature=0, max_tokens=4, logprobs=20, ignore_eos=True, reuse=reuse, extra_args=extra
    )
    return llm.generate([prompt], params)[0]


def distance(one: Any, other: Any) -> float:
    """Largest difference of log-probabilities over answer tokens; infinite if tokens differ."""
    one, other = one.outputs[0], other.outputs[0]
    if list(one.token_ids) != list(other.token_ids):
        return float("inf")
    worst = 0.0
    for a, b in zip(one.logprobs, other.logprobs, strict=True):
        both = set(a) & set(b)
        assert len(both) > 10
        worst = max(worst, *(abs(a[t].logprob - b[t].logprob) for t in both))
    return worst


def full_prefill(llm: Any, prompt: Any) -> Any:
    """The answer with every token computed."""
    llm.reset_prefix_cache()
    out = answer(llm, prompt)
    llm.reset_prefix_cache()
    return out


def assert_exact(strategy: Any, prompt: Any, **extra: Any) -> Any:
    """With `strategy` the answer is full prefill's, from the prompt's first use on."""
    llm = fresh_llm()
    wanted = full_prefill(llm, prompt)
    assert distance(answer(llm, prompt, strategy, **extra), wanted) <= 1e-4
    llm.reset_prefix_cache()
    again = answer(llm, prompt, strategy, **extra)
    assert distance(again, wanted) <= 1e-4
    return again


def assert_exact_behind_a_prefix(strategy: Any) -> None:
    """An exact prefix hit that ends within a chunk, and chunk hits behind it, in one prompt."""
    llm = fresh_llm()
    prompt = [SYSTEM, Chunk(FIRST), Chunk(SECOND), QUESTION]
    wanted = full_prefill(llm, prompt)
    answer(llm, [Chunk(FIRST), Chunk(SECOND), QUESTION], strategy)
    llm.reset_prefix_cache()
    answer(llm, SYSTEM + FIRST[:9])
    out = answer(llm, prompt, strategy)
    assert out.reuse.exact >= len(SYSTEM) + 8
    assert distance(out, wanted) <= 1e-4


def last_rows(report: Any, fate: int) -> np.ndarray:
    """Indices of a fate in the last layers."""
    return np.flatnonzero(report.fates[-1] == fate)
