"""Corrections to stored keys and values, dense or of low rank."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class LowRank(NamedTuple):
    """The patch `left @ right`: `rank * (tokens + kv_heads * width)` numbers instead of all.

    Patches of several chunks in one call are one patch whose `left` is zero outside of each
    chunk's own ranks.
    """

    left: Float[Array, "tokens rank"]
    right: Float[Array, "rank kv_heads width"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(tokens, kv_heads, width)` of the dense patch."""
        _, kv_heads, width = self.right.shape
        return self.left.shape[0], kv_heads, width


Patch = Float[Array, "tokens kv_heads width"] | LowRank


def dense(patch: Patch) -> Array:
    """The patch as float32 `[tokens, kv_heads, width]`."""
    if not isinstance(patch, LowRank):
        return jnp.asarray(patch).astype(jnp.float32)
    left, right = patch.left.astype(jnp.float32), patch.right.astype(jnp.float32)
    flat = jax.lax.dot(left, right.reshape(right.shape[0], -1), precision=jax.lax.Precision.HIGHEST)
    return flat.reshape(patch.shape)
