"""Inverse frequencies and amplitudes of published rotary settings, by transformers."""

# pyright: reportMissingImports=false

from typing import Any

import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32}
_LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_QWEN = {"model_type": "qwen2", "hidden_size": 3584, "num_attention_heads": 28, "rope_theta": 1e6}
_DEEPSEEK = {
    "model_type": "deepseek_v3",
    "qk_rope_head_dim": 64,
    "head_dim": 64,
    "hidden_size": 7168,
    "num_attention_heads": 128,
}
_PHI = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "num_attention_heads": 32,
    "max_position_embeddings": 131_072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0 + 0.05 * i for i in range(48)],
        "long_factor": [1.1 * 1.08**i for i in range(48)],
    },
}

# name -> (config.json as transformers 4 wrote it, context length that is served)
SETTINGS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": (_LLAMA | {"rope_theta": 5e5}, 2048),
    "linear": (_LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.5}}, 2048),
    "dynamic within": (
        _LLAMA
        | {"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        2048,
    ),
    "dynamic beyond": (
        _LLAMA
        | {"max_position_embeddings": 2048}
        | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
        | {"original_max_position_embeddings": 1024},  # which this scaling does not look at
        5000,
    ),
    "Llama 3.1": (
        _LLAMA
        | {"rope_theta": 5e5, "max_position_embeddings": 131_072}
        | {"rope_scaling": _LLAMA_3 | {"factor": 8.0, "original_max_position_embeddings": 8192}},
        8192,
    ),
    "Llama 3.2": (
        {"model_type": "llama", "hidden_size": 2048, "num_attention_heads": 32, "head_dim": 64}
        | {"rope_theta": 5e5, "max_position_embeddings": 131_072}
        | {"rope_scaling": _LLAMA_3 | {"factor": 32.0, "original_max_position_embeddings": 8192}},
        8192,
    ),
    "Qwen2.5 YaRN": (
        _QWEN
        | {"max_position_embeddings": 32_768}
        | {
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32_768,
            }
        },
        32_768,
    ),
    "YaRN without truncation": (
        _QWEN
        | {"max_position_embeddings": 131_072}
        | {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            }
        },
        4096,
    ),
    "YaRN whose factor is the ratio": (
        _QWEN
        | {"max_position_embeddings": 65_536}
        | {
            "rope_scaling": {
                "type": "yarn",
                "factor": None,
                "original_max_position_embeddings": 8192,
            }
        },
        4096,
    ),
    "DeepSeek-V3": (
        _DEEPSEEK
        | {"max_position_embeddings": 163_840}
        | {
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096,
            }
        },
        4096,
    ),
    "DeepSeek-V2-like": (
        _DEEPSEEK
        | {"max_position_embeddings": 163_840}
        | {
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "mscale": 0.707,
                "mscale_all_dim": 1.2,
                "original_max_position_embeddings": 4096,
            }
        },
        4096,
    ),
    "Phi-3 short": (_PHI, 4096),
    "Phi-3 long": (_PHI, 4097),
    "Phi-4-mini": (
        _PHI
        | {"num_attention_heads": 24, "partial_rotary_factor": 0.75}
        | {
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * 48,
                "long_factor": [1.0 + 0.5 * i for i in range(48)],
            }
        },
        8192,
    ),
}


def golden() -> list[dict[str, Any]]:
    """Everything tests/models/golden/rope.json holds."""
    return [
        {"name": name, "config": config, "num_positions": length, **_computed(config, length)}
        for name, (config, length) in SETTINGS.items()
    ]


def _computed(config: dict[str, Any], length: int) -> dict[str, Any]:
    kwargs = {key: _copied(value) for key, value in config.items() if key != "model_type"}
    theirs = transformers.AutoConfig.for_model(config["model_type"], **kwargs)
    kind = theirs.rope_parameters["rope_type"]
    if kind == "default":
        head_dim = theirs.hidden_size // theirs.num_attention_heads
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        inverse, amplitude = 1.0 / theirs.rope_parameters["rope_theta"] ** exponents, 1.0
    else:
        inverse, amplitude = ROPE_INIT_FUNCTIONS[kind](theirs, None, seq_len=length)
    return {"inverse_frequencies": inverse.tolist(), "amplitude": amplitude}


def _copied(value: Any) -> Any:
    """transformers writes into the rope settings it is given."""
    return dict(value) if isinstance(value, dict) else value
