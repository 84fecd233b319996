"""kvjax: LLM inference in JAX, built around one idea - compute a token's KV once, reuse it.

Vocabulary, everywhere: a **page** is `page_size` consecutive KV slots; **slot** = `page * page_size
+ offset`; a **block table** lists the pages of one sequence in sequence order; an **index** is a
place in that order, a **position** turns the rotary embedding; `[lo, hi)` is what a query token may
see; `num_x` counts, `x_ids` are ids, `x_lens` lengths.
"""

from kvjax.async_llm import AsyncLLM
from kvjax.branch import Branch
from kvjax.config import EngineConfig
from kvjax.errors import (
    CorruptWeights,
    KVJaxError,
    ModelNotFound,
    OutOfPages,
    PromptTooLong,
    StepFailed,
    TokenizerNotFound,
    UnsupportedModel,
)
from kvjax.llm import LLM
from kvjax.request import CompletionOutput, Logprob, RequestOutput, SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "Branch",
    "CompletionOutput",
    "CorruptWeights",
    "EngineConfig",
    "KVJaxError",
    "Logprob",
    "ModelNotFound",
    "OutOfPages",
    "PromptTooLong",
    "RequestOutput",
    "SamplingParams",
    "StepFailed",
    "TokenizerNotFound",
    "UnsupportedModel",
]
