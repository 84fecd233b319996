"""Names and values of a GGUF file's tensors -> those of the Hugging Face checkpoint."""

import re
from typing import Any

import numpy as np

from kvjax.errors import UnsupportedModel

_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_LAYER = _LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI_LAYER = _LAYER | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}

# general.architecture -> the names inside one layer
LAYER_NAMES = {
    "llama": _LAYER,
    "qwen2": _LAYER,
    "qwen3": _LAYER,
    "gemma2": _GEMMA_LAYER,
    "gemma3": _GEMMA_LAYER,
    "phi3": _PHI_LAYER,
}

_IN_CONFIG = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_MODEL_TENSOR = re.compile(r"(\w+)\.(weight|bias)")


def hugging_face_name(architecture: str, name: str) -> str | None:
    """The tensor's name there; None if its values are part of the config there."""
    if name in _IN_CONFIG:
        return None
    if match := _LAYER_TENSOR.fullmatch(name):
        layer, part, kind = match.groups()
        if part in LAYER_NAMES[architecture]:
            return f"model.layers.{layer}.{LAYER_NAMES[architecture][part]}.{kind}"
    elif (match := _MODEL_TENSOR.fullmatch(name)) and match[1] in _MODEL:
        return f"{_MODEL[match[1]]}.{match[2]}"
    raise UnsupportedModel(f"tensor {name!r} is not part of a plain {architecture!r} model")


def hugging_face_values(
    architecture: str, name: str, values: np.ndarray, config: dict[str, Any]
) -> np.ndarray:
    """The tensor's values there, given those in the file; same shape, may be `values` itself."""
    match = _LAYER_TENSOR.fullmatch(name)
    part = match[2] if match else ""
    if architecture == "llama" and part in ("attn_q", "attn_k"):
        # Stored for rotary pairs (0,1)(2,3)..; Hugging Face rotates (0,d/2)(1,d/2+1)..
        heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        if values.shape[0] % (2 * heads):
            raise UnsupportedModel(f"{name} {values.shape} does not divide into {heads} heads")
        pairs = values.reshape(heads, -1, 2, *values.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return values - np.float32(1)  # stored as applied: 1 + w
    return values
