"""Gemma 2 and the text part of Gemma 3.

Norms on both sides of attention and MLP, applied as 1 + w; embeddings scaled by sqrt(hidden);
sliding layers between full ones. Gemma 2 caps scores and logits softly; Gemma 3 has norms on
queries and keys instead, and another rotary base where the window slides.
"""

import re
from typing import Any

from kvjax.errors import UnsupportedModel
from kvjax.models import llama
from kvjax.models.config import ModelConfig
from kvjax.models.tensor_names import Tensors, renamed

# What config.json may leave out.
_DEFAULTS = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_WRAPPED = re.compile(r"^(model\.)?language_model\.")  # transformers 5 or 4
_DEFAULTS_3 = _DEFAULTS | {"vocab_size": 262_208, "max_position_embeddings": 131_072}


def gemma2_config(hf: dict[str, Any]) -> ModelConfig:
    """`ModelConfig` of a Hugging Face `config.json` with `model_type` "gemma2"."""
    hf = {**_DEFAULTS, **hf}
    return _config(
        hf,
        period=2,
        attention_soft_cap=hf.get("attn_logit_softcapping", 50.0),
        logit_soft_cap=hf.get("final_logit_softcapping", 30.0),
    )


def gemma3_config(hf: dict[str, Any]) -> ModelConfig:
    """`ModelConfig` of a Hugging Face `config.json` with `model_type` "gemma3_text" or "gemma3".

    The latter wraps a text configuration, which is what is read; its image encoder is not.
    """
    text = {**_DEFAULTS_3, **(hf.get("text_config") or hf), "model_type": hf["model_type"]}
    if "eos_token_id" in hf:  # the wrapper knows the end of a turn as well
        text["eos_token_id"] = hf["eos_token_id"]
    per_type = text.get("rope_parameters") or {}
    wide = {"rope_theta": text.get("rope_theta") or 1e6, **(text.get("rope_scaling") or {})}
    near = {"rope_theta": text.get("rope_local_base_freq") or 10_000.0}
    wide |= per_type.get("full_attention") or {}
    near |= per_type.get("sliding_attention") or {}
    text["rope_parameters"] = wide
    return _config(
        text,
        period=text.get("sliding_window_pattern", 6),
        qk_norm=True,
        local_rope=llama.rope(text, text["head_dim"], near),
        attention_soft_cap=text.get("attn_logit_softcapping"),
        logit_soft_cap=text.get("final_logit_softcapping"),
    )


def gemma3_tensors(tensors: Tensors, config: ModelConfig) -> Tensors:
    """The text model's tensors under the names they have where there is no image encoder."""
    if "model.embed_tokens.weight" in tensors:
        return tensors
    return renamed(tensors, lambda name: _WRAPPED.sub(r"\1", name))


def _config(hf: dict[str, Any], *, period: int, **differences: Any) -> ModelConfig:
    """What both have in common; every `period`-th layer sees everything."""
    if hf.get("use_bidirectional_attention"):
        raise UnsupportedModel("use_bidirectional_attention: an encoder, not a decoder")
    layer_types = hf.get("layer_types") or [
        "sliding_attention" if (layer + 1) % period else "full_attention"
        for layer in range(hf["num_hidden_layers"])
    ]
    act = hf.get("hidden_activation") or "gelu_pytorch_tanh"  # older files' hidden_act is wrong
    return llama.config(
        {**hf, "hidden_act": act},
        mlp_bias=False,
        windows=llama.windows(layer_types, hf["sliding_window"]),
        norm_plus_one=True,
        post_norms=True,
        embed_scale=hf["hidden_size"] ** 0.5,
        query_scale=hf["query_pre_attn_scalar"] ** -0.5,
        **differences,
    )
