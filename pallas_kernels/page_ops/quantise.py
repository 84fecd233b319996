"""Numbers to page contents and back, as pure functions of arrays: for XLA and inside kernels.

A scaled row (one slot of one head) is `stored * scale` with `scale = max |x| / limit`, so the
largest channel is kept to half a step and no slot's scale depends on another slot's.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvjax.pallas_kernels.page_ops.pages import FLOAT8, stored_dtype

LIMITS = {np.dtype(np.int8): 127.0, FLOAT8: 448.0}  # the largest stored magnitude
SMALLEST = np.float32(1e-30)  # of a row's maximum: rows of zeros have a scale that is no denormal


def inverse_limit(dtype: jnp.dtype) -> np.float32:
    """`1 / limit`, once rounded: XLA would turn a division by it into this product anyway."""
    return np.float32(1 / LIMITS[np.dtype(dtype)])


def to_bits(x: Array, physical: np.dtype) -> Array:
    """`x` rounded to what `physical` holds, as `physical`. No scale is involved."""
    stored = x.astype(stored_dtype(physical))
    return stored if stored.dtype == physical else jax.lax.bitcast_convert_type(stored, physical)


def from_bits(x: Array) -> Array:
    """Numbers of page contents, without their scale: int8 stays int8."""
    dtype = stored_dtype(x.dtype)
    return x if dtype == x.dtype else jax.lax.bitcast_convert_type(x, dtype)


def quantise(
    x: Float[Array, "*rows width"], physical: np.dtype
) -> tuple[Array, Float[Array, "*rows"]]:
    """Rows as int8 or float8 of `physical` dtype, and the float32 scale of each.

    int8 rounds half to even. A row with NaN gets a scale of NaN, so it stays NaN.
    """
    dtype = stored_dtype(physical)
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), SMALLEST) * inverse_limit(dtype)
    x = x / scale[..., None]
    return to_bits(jnp.round(x) if dtype == jnp.int8 else x, physical), scale


def dequantise(x: Array, scale: Float[Array, "*rows"]) -> Float[Array, "*rows width"]:
    """Float32 numbers of scaled rows."""
    return from_bits(x).astype(jnp.float32) * scale[..., None]


def encode(x: Float[Array, "*rows width"], physical: np.dtype) -> tuple[Array, Array | None]:
    """Page contents of `x`, with the scale of each row where `physical` needs one."""
    if stored_dtype(physical) in LIMITS:
        return quantise(x, physical)
    return to_bits(x, physical), None


def decode(x: Array, scale: Array | None = None) -> Array:
    """Numbers of page contents: float32 of scaled ones, else the dtype that is stored."""
    return from_bits(x) if scale is None else dequantise(x, scale)
