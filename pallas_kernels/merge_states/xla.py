"""Merging attention states in XLA, which fuses it into one pass: any platform."""

import jax.numpy as jnp
from jaxtyping import Array


def merge_states(o: Array, lse: Array) -> tuple[Array, Array]:
    """See `kvjax.pallas_kernels.merge_states`."""
    o, lse = o.astype(jnp.float32), lse.astype(jnp.float32)
    top = jnp.max(lse, axis=0)
    empty = top == -jnp.inf
    weights = jnp.exp(lse - jnp.where(empty, 0.0, top))  # [parts, tokens, heads]
    total = jnp.sum(weights, axis=0)
    o = jnp.where((weights > 0)[..., None], o, 0.0)  # a part that saw nothing may hold anything
    out = jnp.sum(o * weights[..., None], axis=0) / jnp.where(empty, 1.0, total)[..., None]
    return out, jnp.where(empty, -jnp.inf, top + jnp.log(jnp.where(empty, 1.0, total)))
