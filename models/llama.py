"""Llama 2 and 3.x and SmolLM2: the plain decoder. Other families start from its reading."""

from typing import Any

from kvjax.errors import UnsupportedModel
from kvjax.models.config import ModelConfig, RopeConfig
from kvjax.pallas_kernels import Activation

_SCALINGS = ("none", "linear", "dynamic", "llama3", "yarn", "longrope")
_ALIASES = {"default": "none", "su": "longrope"}


def config(hf: dict[str, Any], **differences: Any) -> ModelConfig:
    """`ModelConfig` of a Hugging Face `config.json` with `model_type` "llama".

    A family that reads its configuration alike passes the fields of `ModelConfig` that differ.
    """
    heads = hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    eos = hf.get("eos_token_id")
    fields: dict[str, Any] = {
        "architecture": hf["model_type"],
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "max_position": hf["max_position_embeddings"],
        "norm_eps": hf["rms_norm_eps"],
        "rope": rope(hf, head_dim),
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "qkv_bias": bool(hf.get("attention_bias", False)),
        "o_bias": bool(hf.get("attention_bias", False)),
        "mlp_bias": bool(hf.get("mlp_bias", False)),
        "activation": activation(hf.get("hidden_act", "silu")),
        "bos_token_id": hf.get("bos_token_id"),
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    }
    return ModelConfig(**fields | differences)


def activation(name: str) -> Activation:
    """Our name of a Hugging Face activation."""
    if name in ("silu", "swish"):
        return "silu"
    if name in ("gelu_pytorch_tanh", "gelu_new"):
        return "gelu_tanh"
    raise UnsupportedModel(f"activation {name!r}; supported are silu and gelu_pytorch_tanh")


def windows(layer_types: list[str], window: int | None) -> tuple[int | None, ...]:
    """`ModelConfig.windows` of Hugging Face's `layer_types`; () where every layer sees all."""
    for kind in layer_types:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModel(f"layers of type {kind!r} are not supported")
    if "sliding_attention" not in layer_types:
        return ()
    if not window or window < 1:
        raise UnsupportedModel(f"layers with sliding attention but sliding_window={window}")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def rope(hf: dict[str, Any], head_dim: int, parameters: dict[str, Any] | None = None) -> RopeConfig:
    """Rotary settings from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (4).

    `parameters` takes the place of both where a family keeps them elsewhere.
    """
    p = parameters or hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if any(isinstance(value, dict) for value in p.values()):
        raise UnsupportedModel(f"rotary settings per layer type {sorted(p)}")
    kind = p.get("rope_type") or p.get("type") or "default"
    scaling = _ALIASES.get(kind, kind)
    if scaling not in _SCALINGS:
        raise UnsupportedModel(f"rope scaling {kind!r}; supported are {', '.join(_SCALINGS)}")
    max_position = hf["max_position_embeddings"]
    original = max_position
    if scaling != "dynamic":  # which stretches from max_position_embeddings whatever else is given
        original = (
            hf.get("original_max_position_embeddings")
            or p.get("original_max_position_embeddings")
            or max_position
        )
    factor = p.get("factor")
    if factor is None:
        factor = max_position / original if scaling in ("longrope", "yarn") else 1.0
    partial = p.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    return RopeConfig(
        theta=float(p.get("rope_theta") or hf.get("rope_theta") or 10_000.0),
        rotary_dim=int(head_dim * partial),
        scaling=scaling,
        factor=float(factor),
        original_max_position=original,
        low_freq_factor=float(p.get("low_freq_factor", 1.0)),
        high_freq_factor=float(p.get("high_freq_factor", 4.0)),
        beta_fast=float(p.get("beta_fast") or 32.0),
        beta_slow=float(p.get("beta_slow") or 1.0),
        attention_factor=p.get("attention_factor"),
        mscale=p.get("mscale"),
        mscale_all_dim=p.get("mscale_all_dim"),
        truncate=bool(p.get("truncate", True)),
        short_factor=tuple(p.get("short_factor") or ()),
        long_factor=tuple(p.get("long_factor") or ()),
    )
