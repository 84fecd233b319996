"""Mistral: Llama whose layers all see a sliding window, where the checkpoint sets one."""

from typing import Any

from kvjax.models import llama
from kvjax.models.config import ModelConfig

_DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}  # what config.json may leave out


def config(hf: dict[str, Any]) -> ModelConfig:
    """`ModelConfig` of a Hugging Face `config.json` with `model_type` "mistral"."""
    hf = {**_DEFAULTS, **hf}
    window = hf["sliding_window"]
    return llama.config(hf, windows=(window,) * hf["num_hidden_layers"] if window else ())
