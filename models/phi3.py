"""Phi-3, Phi-3.5 and Phi-4-mini: Llama with fused matrices, LongRoPE and partly rotated heads."""

from typing import Any

from kvjax.models import llama
from kvjax.models.config import ModelConfig
from kvjax.models.tensor_names import Tensors, split_rows

_DEFAULTS = {"original_max_position_embeddings": 4096, "tie_word_embeddings": False}


def config(hf: dict[str, Any]) -> ModelConfig:
    """`ModelConfig` of a Hugging Face `config.json` with `model_type` "phi3"."""
    hf = {**_DEFAULTS, **hf}
    p = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    if (p.get("rope_type") or p.get("type")) == "yarn":  # early files call LongRoPE so
        p["rope_type"] = "longrope"
    window = hf.get("sliding_window")
    return llama.config(
        {**hf, "rope_parameters": p},
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        windows=(window,) * hf["num_hidden_layers"] if window else (),
    )


def tensors(tensors: Tensors, config: ModelConfig) -> Tensors:
    """`qkv_proj` cut into q, k and v, `gate_up_proj` into gate and up; each read when asked for."""
    if "model.layers.0.self_attn.qkv_proj.weight" not in tensors:
        return tensors
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    wide = config.intermediate_size
    parts = {}
    for layer in range(config.num_layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        parts[f"{attention}.qkv_proj.weight"] = [
            (f"{attention}.q_proj.weight", query),
            (f"{attention}.k_proj.weight", key),
            (f"{attention}.v_proj.weight", key),
        ]
        parts[f"{mlp}.gate_up_proj.weight"] = [
            (f"{mlp}.gate_proj.weight", wide),
            (f"{mlp}.up_proj.weight", wide),
        ]
    return split_rows(tensors, parts)
