"""What reuse strategies may depend on, of a model and how its KV is kept."""

import jax.numpy as jnp

from kvjax.cache.pages import KVSpec
from kvjax.models import ModelConfig
from kvjax.reuse.restore import hidden_dtype
from kvjax.reuse.strategy import ModelFacts


def model_facts(config: ModelConfig, spec: KVSpec, tag: str = "") -> ModelFacts:
    """`tag`: `kvjax.models.tag.model_tag`, where KV is stored."""
    width = jnp.dtype(hidden_dtype(spec)).itemsize
    return ModelFacts(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        kv_token_bytes=spec.bytes(1),
        hidden_token_bytes=width * config.hidden_size * config.num_layers,
        tag=tag,
    )
