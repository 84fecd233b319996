"""Tiny transformers models of every supported class, their weights drawn from a seed.

Weights are multiples that float16 holds exactly, so that a file of half the size has all of them.
"""

# pyright: reportMissingImports=false

import dataclasses
from typing import Any

import numpy as np
import torch
import transformers

VOCAB = 64
LENGTHS = (70, 9)  # tokens: beyond a prefill tile and every window below; and shorter than both


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of a family, `config` as transformers 4 wrote it."""

    name: str
    config: dict[str, Any]
    lengths: tuple[int, ...] = LENGTHS


def _cases(base: dict[str, Any], **variants: dict[str, Any]) -> tuple[Case, ...]:
    """A case per variant; "..._long" chooses its rotary table by length, so it has one."""
    return tuple(
        Case(name, {**base, **changes}, LENGTHS[:1] if name.endswith("_long") else LENGTHS)
        for name, changes in variants.items()
    )


_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA = _BASE | {"model_type": "llama", "attention_bias": True, "mlp_bias": True}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_GEMMA = _BASE | {
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 40,
    "sliding_window": 12,
    "num_hidden_layers": 3,
    "tie_word_embeddings": True,
}
_LATENT = _BASE | {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "first_k_dense_replace": 2,
    "rms_norm_eps": 1e-3,  # unlike that of the norms on latents, which is fixed
}
_PHI_FACTORS = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.5, 2.0, 2.5],
    "long_factor": [1.5, 2.0, 3.0, 5.0, 8.0, 12.0],
}
_PHI_LONG = {"rope_scaling": _PHI_FACTORS, "partial_rotary_factor": 0.75}

FAMILIES: dict[str, tuple[Case, ...]] = {
    "llama": _cases(
        _LLAMA,
        plain={},
        linear={"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        dynamic={"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        dynamic_long={
            "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
            "max_position_embeddings": 32,
        },
        llama3={
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        yarn={"rope_scaling": _YARN},
        yarn_by_hand={
            "rope_scaling": _YARN
            | {"attention_factor": 0.9, "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False}
        },
    ),
    "llama_multi_head": _cases(
        _BASE
        | {"model_type": "llama", "num_key_value_heads": 4, "head_dim": 8}
        | {"tie_word_embeddings": True},
        plain={},
    ),
    "mistral": _cases(
        _BASE | {"model_type": "mistral"},
        window={"sliding_window": 12},
        full={"sliding_window": None},
    ),
    "qwen2": _cases(
        _BASE
        | {"model_type": "qwen2", "sliding_window": 12, "max_window_layers": 1}
        | {"head_dim": 12},
        full={"use_sliding_window": False},
        mixed={"use_sliding_window": True},
    ),
    "qwen3": _cases(
        _BASE | {"model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": True},
        full={},
        yarn={"rope_scaling": _YARN},
    ),
    "gemma2": _cases(
        _GEMMA | {"model_type": "gemma2"},
        capped={"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
        uncapped={"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3_text": _cases(
        _GEMMA
        | {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 100.0}
        | {"sliding_window_pattern": 2},
        plain={},
        linear={"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "phi3": _cases(
        _BASE | {"model_type": "phi3", "hidden_size": 64},
        window={"sliding_window": 12},
        longrope=_PHI_LONG
        | {"original_max_position_embeddings": 128}
        | {"max_position_embeddings": 512},
        longrope_long=_PHI_LONG | {"original_max_position_embeddings": 32},
    ),
    "smollm3": _cases(
        _BASE | {"model_type": "smollm3", "num_hidden_layers": 4, "tie_word_embeddings": True},
        full={},
        window={"use_sliding_window": True, "sliding_window": 12},
        by_list={"no_rope_layers": [0, 1, 1, 0]},
    ),
    "deepseek_v2": _cases(
        _LATENT | {"model_type": "deepseek_v2", "attention_bias": True},
        plain={},
        yarn={"rope_scaling": _YARN | {"mscale": 0.7, "mscale_all_dim": 0.9}},
    ),
    "deepseek_v3": _cases(
        _LATENT | {"model_type": "deepseek_v3", "q_lora_rank": 16},
        interleaved={},
        halves={"rope_interleave": False},
        yarn={"rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
}


def build(case: Case) -> tuple[Any, dict[str, Any]]:
    """The transformers model with float32 weights and eager attention, and its saved config."""
    kwargs = {key: value for key, value in case.config.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(case.config["model_type"], **_copied(kwargs))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.float().eval(), config.to_dict()


def set_weights(model: Any, weights: dict[str, np.ndarray]) -> None:
    """Copies `weights` into `model`; every parameter must be among them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name].astype(np.float32)))


def draw_weights(model: Any, seed: int) -> dict[str, np.ndarray]:
    """Float16 values for every parameter, large enough for attention to be far from uniform."""
    rng = np.random.default_rng(seed)
    gemma = model.config.model_type.startswith("gemma")
    weights = {}
    for name, parameter in model.named_parameters():
        values = rng.standard_normal(tuple(parameter.shape))
        if name.endswith("norm.weight"):
            values = 0.2 * values + (0 if gemma else 1)
        elif name.endswith("bias"):
            values = 0.3 * values
        elif "embed_tokens" in name:
            values = values / (model.config.hidden_size**0.5 if gemma else 2)
        else:
            values = 1.5 * values * parameter.shape[-1] ** -0.5
        weights[name] = values.astype(np.float16)
    return weights


def token_ids(length: int, seed: int) -> np.ndarray:
    """Random int32 tokens."""
    return np.random.default_rng(seed).integers(0, VOCAB, length, dtype=np.int32)


@torch.no_grad()
def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """Float32 `[tokens, vocab]` of one sequence."""
    return model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()


def _copied(value: Any) -> Any:
    """transformers writes into the rope settings it is given."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value
