"""DeepSeek-V2 and V3 with dense MLPs: latent attention, rotary pairs next to each other."""

import dataclasses
import math
from typing import Any

from kvjax.errors import UnsupportedModel
from kvjax.models import llama
from kvjax.models.config import LatentConfig, ModelConfig


def config(hf: dict[str, Any]) -> ModelConfig:
    """`ModelConfig` of a Hugging Face `config.json`, `model_type` "deepseek_v2" or "deepseek_v3".

    Raises:
      UnsupportedModel: some layers are mixtures of experts.
    """
    dense, layers = hf.get("first_k_dense_replace") or 0, hf["num_hidden_layers"]
    if hf.get("n_routed_experts", -1) is not None and dense < layers:
        raise UnsupportedModel(
            f"{hf['model_type']} with mixture-of-experts layers (from layer {dense} of {layers}); "
            f"only dense models are supported"
        )
    nope, rotary = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"]
    # In V2 only pairs (0,1)(2,3).. exist; V3 may say otherwise.
    interleaved = hf["model_type"] == "deepseek_v2" or bool(hf.get("rope_interleave", True))
    rope = dataclasses.replace(llama.rope(hf, rotary), interleaved=interleaved)
    return llama.config(
        {**hf, "num_key_value_heads": hf["num_attention_heads"]},
        head_dim=nope + rotary,
        rope=rope,
        query_scale=(nope + rotary) ** -0.5 * _temperature(rope.factor, rope.mscale_all_dim) ** 2,
        latent=LatentConfig(
            kv_lora_rank=hf["kv_lora_rank"],
            q_lora_rank=hf.get("q_lora_rank"),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rotary,
            v_head_dim=hf["v_head_dim"],
        ),
    )


def _temperature(factor: float, mscale: float | None) -> float:
    """What YaRN multiplies queries and keys by, moved into the scale of the scores."""
    return 0.1 * mscale * math.log(factor) + 1.0 if mscale and factor > 1 else 1.0
