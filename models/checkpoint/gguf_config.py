"""Metadata of a GGUF file -> the `config.json` that Hugging Face would have for the model."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.errors import CorruptWeights, UnsupportedModel
from kvjax.models.checkpoint.gguf_names import LAYER_NAMES

_CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
}
assert _CLASSES.keys() == LAYER_NAMES.keys()

_GEMMA3_PATTERN = 6  # five sliding layers, then one that sees everything
_REQUIRED = object()


class _Metadata:
    """Typed access to the keys of one architecture; a float comes as its shortest decimal."""

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        self.file, self.values = file, values
        self.architecture = values.get("general.architecture")

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self.values.get(f"{self.architecture}.{key}", default)
        if value is _REQUIRED:
            raise CorruptWeights(f"{self.file}: no key {self.architecture}.{key}")
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]  # the same for every layer
        if isinstance(value, list):
            raise UnsupportedModel(f"{self.file}: {key} differs between layers")
        return float(str(np.float32(value))) if isinstance(value, float) else value


def hugging_face_config(
    file: Path,
    values: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
) -> dict[str, Any]:
    """The config, from the file's metadata, its tensors' shapes, and `read` of rotary factors.

    Raises `UnsupportedModel` for an architecture not in the table, and for what a dense decoder
    of that architecture would not have (experts, sizes that differ between layers).
    """
    metadata = _Metadata(file, values)
    if metadata.architecture not in _CLASSES:
        raise UnsupportedModel(
            f"{file}: architecture {metadata.architecture!r}; known: {', '.join(_CLASSES)}"
        )
    if metadata.get("expert_count", 0):
        raise UnsupportedModel(f"{file}: a mixture of experts")
    if "token_embd.weight" not in shapes:
        raise CorruptWeights(f"{file}: tensor 'token_embd.weight' is missing")
    model_type, class_name = _CLASSES[metadata.architecture]
    heads = metadata.get("attention.head_count")
    head_dim = metadata.get("attention.key_length", metadata.get("embedding_length") // heads)
    config = {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": metadata.get("embedding_length"),
        "intermediate_size": metadata.get("feed_forward_length"),
        "num_hidden_layers": metadata.get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.get("context_length"),
        "rms_norm_eps": metadata.get("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.get("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(metadata, shapes, read, head_dim),
        "tie_word_embeddings": "output.weight" not in shapes,
        "hidden_act": "silu",
        "bos_token_id": values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos_token_ids(values),
        "pad_token_id": values.get("tokenizer.ggml.padding_token_id"),
    }
    return config | _SPECIFICS[metadata.architecture](metadata, shapes, config)


def eos_token_ids(values: Mapping[str, Any]) -> list[int]:
    """Ids that end a generation, the tokenizer's own end-of-sequence first."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(values[key] for key in keys if key in values))


def _rope_scaling(
    metadata: _Metadata,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    head_dim: int,
) -> dict[str, Any] | None:
    if "rope_freqs.weight" in shapes:
        return _llama3_scaling(metadata, read("rope_freqs.weight").astype(np.float64), head_dim)
    original = metadata.get("rope.scaling.original_context_length", None)
    if "rope_factors_long.weight" in shapes:
        scaling = {
            "rope_type": "longrope",
            "long_factor": read("rope_factors_long.weight").tolist(),
            "short_factor": read("rope_factors_short.weight").tolist(),
            "original_max_position_embeddings": original,
        }
        return scaling | _optional(
            attention_factor=metadata.get("rope.scaling.attn_factor", None),
        )
    kind = metadata.get("rope.scaling.type", None)
    factor = metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 1.0))
    if kind in (None, "none", "linear"):
        # Older files give the factor alone, which means linear.
        linear = kind != "none" and factor not in (0.0, 1.0)
        return {"rope_type": "linear", "factor": factor} if linear else None
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor} | _optional(
            original_max_position_embeddings=original,
            beta_fast=metadata.get("rope.scaling.yarn_beta_fast", None),
            beta_slow=metadata.get("rope.scaling.yarn_beta_slow", None),
        )
    raise UnsupportedModel(f"{metadata.file}: rope scaling {kind!r}")


def _llama3_scaling(metadata: _Metadata, divisors: np.ndarray, head_dim: int) -> dict[str, Any]:
    """The llama3 rule that gives these frequency divisors, float64 [head_dim / 2].

    The file has the divisors only. Every published model used the same band of frequencies, so it
    is tried, and must reproduce them.
    """
    factor = float(divisors.max())
    original = metadata.get("rope.scaling.original_context_length", 8192)
    low, high = 1.0, 4.0
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    turns = original * metadata.get("rope.freq_base", 10_000.0) ** -exponents / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise UnsupportedModel(f"{metadata.file}: rope_freqs follow no rule known here")
    return {
        "rope_type": "llama3",
        "factor": float(f"{factor:.6g}"),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _optional(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _llama(
    metadata: _Metadata, shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any]
) -> dict[str, Any]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
    }


def _qwen2(
    metadata: _Metadata, shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any]
) -> dict[str, Any]:
    return {"use_sliding_window": False}


def _qwen3(
    metadata: _Metadata, shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any]
) -> dict[str, Any]:
    return {"use_sliding_window": False, "attention_bias": "blk.0.attn_q.bias" in shapes}


def _phi3(
    metadata: _Metadata, shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any]
) -> dict[str, Any]:
    rotary = metadata.get("rope.dimension_count", config["head_dim"])
    original = metadata.get("rope.scaling.original_context_length", None)
    return {
        "sliding_window": metadata.get("attention.sliding_window", None) or None,
        "partial_rotary_factor": rotary / config["head_dim"],
        "original_max_position_embeddings": original or config["max_position_embeddings"],
    }


def _gemma(config: dict[str, Any], largest: int) -> dict[str, Any]:
    """What both Gemmas have. The query scale is not in the file: only the largest differs."""
    per_head = config["hidden_size"] // config["num_attention_heads"]
    is_largest = config["num_hidden_layers"] == largest
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": per_head if is_largest else config["head_dim"],
    }


def _gemma2(
    metadata: _Metadata, shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any]
) -> dict[str, Any]:
    return _gemma(config, largest=46) | {
        "attn_logit_softcapping": metadata.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.get("final_logit_softcapping", 30.0),
        "sliding_window": metadata.get("attention.sliding_window", 4096),
        "layer_types": _layer_types(config, period=2),
    }


def _gemma3(
    metadata: _Metadata, shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any]
) -> dict[str, Any]:
    return _gemma(config, largest=62) | {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": metadata.get("final_logit_softcapping", None),
        "rope_theta": metadata.get("rope.freq_base", 1_000_000.0),
        "rope_local_base_freq": metadata.get("rope.freq_base_swa", 10_000.0),
        "sliding_window": metadata.get("attention.sliding_window"),
        "sliding_window_pattern": _GEMMA3_PATTERN,
        "layer_types": _layer_types(config, period=_GEMMA3_PATTERN),
    }


def _layer_types(config: dict[str, Any], period: int) -> list[str]:
    """Every `period`-th layer sees everything."""
    return [
        "sliding_attention" if (layer + 1) % period else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]


_SPECIFICS = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
}
