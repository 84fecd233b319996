"""Keys patched and rotated in float32: the arithmetic that backends share."""

import jax.numpy as jnp
from jaxtyping import Array


def moved_keys(k: Array, cos, sin, patch: Array | None, frame: str, offset: int) -> Array:
    """Float32 keys `[tokens, kv_heads, width]`, patched and rotated."""
    k = k.astype(jnp.float32)
    if patch is not None and frame == "source":
        k = k + patch
    k = rotate(k, jnp.asarray(cos), jnp.asarray(sin), offset)
    return k + patch if patch is not None and frame == "target" else k


def rotate(k: Array, cos: Array, sin: Array, offset: int) -> Array:
    """Keys with the channel pairs `offset + i`, `offset + half + i` turned."""
    cos, sin, half = cos[:, None], sin[:, None], cos.shape[1]
    before, first, second, after = jnp.split(k, (offset, offset + half, offset + 2 * half), axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([before, *turned, after], axis=-1)
