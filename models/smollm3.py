"""SmolLM3: Llama in which every fourth layer does without rotary embedding (arXiv 2501.18795)."""

from typing import Any

from kvjax.models import llama
from kvjax.models.config import ModelConfig

_DEFAULTS = {"tie_word_embeddings": True, "rope_theta": 2_000_000.0, "num_key_value_heads": 4}


def config(hf: dict[str, Any]) -> ModelConfig:
    """`ModelConfig` of a Hugging Face `config.json` with `model_type` "smollm3"."""
    hf = {**_DEFAULTS, **hf}
    layers, interval = hf["num_hidden_layers"], hf.get("no_rope_layer_interval", 4)
    rotates = hf.get("no_rope_layers")  # 1 where a layer does rotate, in spite of the name
    if rotates is None:
        rotates = [int((layer + 1) % interval != 0) for layer in range(layers)]
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    layer_types = hf.get("layer_types") if window else None
    layer_types = layer_types or [
        "full_attention" if turns or not window else "sliding_attention"
        for turns in rotates[:layers]
    ]
    return llama.config(
        hf,
        rotary_layers=tuple(bool(turns) for turns in rotates[:layers]),
        windows=llama.windows(layer_types, window),
    )
