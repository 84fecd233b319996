"""Random weights of any configuration, for tests, benchmarks and shapes nobody has published."""

import numpy as np

from kvjax.models.config import ModelConfig
from kvjax.models.tensor_names import Tensors


def random_tensors(config: ModelConfig, seed: int = 0) -> Tensors:
    """Float32 tensors under their Hugging Face names, with activations of ordinary size."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("norm.weight"):
            return 0.1 * values + (0 if config.norm_plus_one else 1)
        if name == "model.embed_tokens.weight" and not config.tie_embeddings:
            return values / np.float32(config.embed_scale)
        return values * np.float32(shape[-1] ** -0.5)

    return {name: draw(name, shape) for name, shape in tensor_shapes(config).items()}


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor that a model of `config` is built from."""
    c = config
    shapes = {
        "model.embed_tokens.weight": (c.vocab_size, c.hidden_size),
        "model.norm.weight": (c.hidden_size,),
    }
    if not c.tie_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if c.post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    attention = _latent(c) if c.latent else _attention(c)
    for layer in range(c.num_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{norm}.weight": (c.hidden_size,) for norm in norms}
        shapes |= {f"{prefix}.self_attn.{name}": shape for name, shape in attention.items()}
        for name, out, in_ in (
            ("gate", c.intermediate_size, c.hidden_size),
            ("up", c.intermediate_size, c.hidden_size),
            ("down", c.hidden_size, c.intermediate_size),
        ):
            shapes[f"{prefix}.mlp.{name}_proj.weight"] = (out, in_)
            if c.mlp_bias:
                shapes[f"{prefix}.mlp.{name}_proj.bias"] = (out,)
    return shapes


def _attention(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "q_proj.weight": (queries, c.hidden_size),
        "k_proj.weight": (keys, c.hidden_size),
        "v_proj.weight": (keys, c.hidden_size),
        "o_proj.weight": (c.hidden_size, queries),
    }
    if c.qkv_bias:
        shapes |= {"q_proj.bias": (queries,), "k_proj.bias": (keys,), "v_proj.bias": (keys,)}
    if c.o_bias:
        shapes["o_proj.bias"] = (c.hidden_size,)
    if c.qk_norm:
        shapes |= {"q_norm.weight": (c.head_dim,), "k_norm.weight": (c.head_dim,)}
    return shapes


def _latent(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    m = c.latent
    assert m is not None
    queries = c.num_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
    stored = m.kv_lora_rank + m.qk_rope_head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "kv_a_proj_with_mqa.weight": (stored, c.hidden_size),
        "kv_a_layernorm.weight": (m.kv_lora_rank,),
        "kv_b_proj.weight": (c.num_heads * (m.qk_nope_head_dim + m.v_head_dim), m.kv_lora_rank),
        "o_proj.weight": (c.hidden_size, c.num_heads * m.v_head_dim),
    }
    if m.q_lora_rank is None:
        shapes["q_proj.weight"] = (queries, c.hidden_size)
    else:
        shapes |= {
            "q_a_proj.weight": (m.q_lora_rank, c.hidden_size),
            "q_a_layernorm.weight": (m.q_lora_rank,),
            "q_b_proj.weight": (queries, m.q_lora_rank),
        }
    if c.qkv_bias:
        shapes["kv_a_proj_with_mqa.bias"] = (stored,)
        if m.q_lora_rank is not None:
            shapes["q_a_proj.bias"] = (m.q_lora_rank,)
    if c.o_bias:
        shapes["o_proj.bias"] = (c.hidden_size,)
    return shapes
