"""Qwen2, Qwen2.5 (biases on q, k and v alone) and Qwen3 (norms on queries and keys instead)."""

from typing import Any

from kvjax.models import llama
from kvjax.models.config import ModelConfig


def qwen2_config(hf: dict[str, Any]) -> ModelConfig:
    """`ModelConfig` of a Hugging Face `config.json` with `model_type` "qwen2"."""
    return llama.config(hf, qkv_bias=True, o_bias=False, mlp_bias=False, windows=_windows(hf))


def qwen3_config(hf: dict[str, Any]) -> ModelConfig:
    """`ModelConfig` of a Hugging Face `config.json` with `model_type` "qwen3"."""
    hf = {"head_dim": 128, **hf}
    return llama.config(hf, qk_norm=True, windows=_windows(hf))


def _windows(hf: dict[str, Any]) -> tuple[int | None, ...]:
    """Layers from `max_window_layers` on slide, if any does; newer files list them instead."""
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    first = hf.get("max_window_layers", 28)
    layer_types = hf.get("layer_types") or [
        "sliding_attention" if window and layer >= first else "full_attention"
        for layer in range(hf["num_hidden_layers"])
    ]
    return llama.windows(layer_types, window)
