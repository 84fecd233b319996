"""Small engines over the tiny models of `tests/models/golden`, one per feature of positions."""

import dataclasses
import functools
import sys
import time
from typing import Any
from unittest import mock

import numpy as np

from kvjax import LLM
from kvjax.build import Built, enable_compilation_cache
from kvjax.config import EngineConfig
from kvjax.engine import Engine
from kvjax.intake import Intake
from kvjax.models import Transformer, kv_spec, load_model, model_config, random_tensors
from tests.models.golden_cases import load_family
from tests.tiny_model import CONFIG, LetterTokenizer

# What could make a stored key wrong at another position, and a tiny model that has it.
FEATURES = {
    "linear scaling": ("llama", "linear"),
    "dynamic NTK, stretched": ("llama", "dynamic_long"),
    "llama3 scaling": ("llama", "llama3"),
    "YaRN with its amplitude": ("llama", "yarn"),
    "YaRN behind a norm of keys": ("qwen3", "yarn"),
    "longrope with its amplitude, partial rotary": ("phi3", "longrope_long"),
    "longrope, short factors": ("phi3", "longrope"),
    "sliding windows in every layer": ("mistral", "window"),
    "sliding windows in some layers": ("qwen2", "mixed"),
    "windows and capped scores": ("gemma2", "capped"),
    "two bases, local and global": ("gemma3_text", "plain"),
    "two bases, one of them scaled": ("gemma3_text", "linear"),
    "layers without rotary": ("smollm3", "full"),
    "layers without rotary, windows": ("smollm3", "window"),
    "latent": ("deepseek_v3", "halves"),
    "latent, interleaved pairs": ("deepseek_v3", "interleaved"),
    "latent, YaRN": ("deepseek_v2", "yarn"),
}
POSITIONS = 128  # of the rotary tables; "dynamic" and "longrope" choose by it


class SmallTokenizer(LetterTokenizer):
    """Letters as the 63 ids that these models have beside the end."""

    vocab_size = 64

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) % 63 + 1 for letter in text]


@functools.cache
def model_with(feature: str) -> Transformer:
    """The tiny model that has a feature."""
    family, name = FEATURES[feature]
    case = load_family(family)[name]
    return load_model(
        model_config(case.config), case.tensors, dtype="float32", num_positions=POSITIONS,
        deterministic=True,
    )  # fmt: skip


@functools.lru_cache(maxsize=1)
def llm_with(feature: str) -> Any:
    """An `LLM` over it, shared by a feature's tests."""
    return _llm(model_with(feature), SmallTokenizer())


@functools.cache
def deep_model() -> Transformer:
    """The tiny model with a third layer."""
    config = dataclasses.replace(CONFIG, num_layers=3)
    weights = random_tensors(config, seed=1)
    return load_model(config, weights, dtype="float32", num_positions=POSITIONS, deterministic=True)


def deep_llm() -> Any:
    """An `LLM` over it."""
    return _llm(deep_model(), LetterTokenizer())


def _llm(model: Transformer, tokenizer: Any) -> Any:
    enable_compilation_cache()
    config = EngineConfig(
        dtype="float32", page_size=16, max_model_len=POSITIONS, max_num_seqs=2,
        max_num_batched_tokens=128, deterministic=True, seed=0,
    )  # fmt: skip
    engine = Engine(model, kv_spec(model.config, "float32", 16), 64, config, POSITIONS)
    intake = Intake(
        tokenizer, vocab_size=tokenizer.vocab_size, end_token_ids=(0,), max_model_len=POSITIONS,
        max_prompt_tokens=1024, seed=0, clock=time.monotonic,
    )  # fmt: skip
    built = Built(engine, intake, None, model.config, tokenizer)  # type: ignore[arg-type]
    with mock.patch.object(sys.modules[LLM.__module__], "build", return_value=built):
        return LLM("tiny", seed=0)


def letters(count: int, seed: int) -> str:
    """A text of distinct-looking letters."""
    drawn = np.random.default_rng(seed).integers(ord("a"), ord("z") + 1, count)
    return "".join(map(chr, drawn))
