"""kvjax: LLM inference in JAX, built around one idea - compute a token's KV once, reuse it.

Vocabulary, everywhere: a **page** is `page_size` consecutive KV slots; **slot** = `page * page_size
+ offset`; a **block table** lists the pages of one sequence in sequence order; an **index** is a
place in that order, a **position** turns the rotary embedding; `[lo, hi)` is what a query token may
see; `num_x` counts, `x_ids` are ids, `x_lens` lengths.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvjax.async_llm import AsyncLLM as AsyncLLM
    from kvjax.branch import Branch as Branch
    from kvjax.config import EngineConfig as EngineConfig
    from kvjax.errors import CorruptWeights as CorruptWeights
    from kvjax.errors import GrammarFailed as GrammarFailed
    from kvjax.errors import KVJaxError as KVJaxError
    from kvjax.errors import ModelNotFound as ModelNotFound
    from kvjax.errors import OutOfPages as OutOfPages
    from kvjax.errors import PromptTooLong as PromptTooLong
    from kvjax.errors import StepFailed as StepFailed
    from kvjax.errors import TokenizerNotFound as TokenizerNotFound
    from kvjax.errors import UnsupportedModel as UnsupportedModel
    from kvjax.llm import LLM as LLM
    from kvjax.request import Chunk as Chunk
    from kvjax.request import CompletionOutput as CompletionOutput
    from kvjax.request import Logprob as Logprob
    from kvjax.request import RequestOutput as RequestOutput
    from kvjax.request import SamplingParams as SamplingParams
    from kvjax.request import StructuredOutputs as StructuredOutputs

__version__ = "0.1.0"

_HOMES = {  # public name -> module, imported when first asked for: host-only parts need no jax
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "Branch": "branch",
    "EngineConfig": "config",
    **dict.fromkeys(
        ("Chunk", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams"), "request"
    ),
    "StructuredOutputs": "request",
    "GrammarFailed": "errors",
    **dict.fromkeys(
        ("CorruptWeights", "KVJaxError", "ModelNotFound", "OutOfPages", "PromptTooLong"), "errors"
    ),
    **dict.fromkeys(("StepFailed", "TokenizerNotFound", "UnsupportedModel"), "errors"),
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvjax' has no attribute {name!r}")
    return getattr(import_module(f"kvjax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
