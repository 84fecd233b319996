"""Sums over the last axis that give a row the same bits in every batch.

XLA:CPU vectorises a plain reduction differently for different row counts, so a mean over 576
channels changes at 8 rows (measured on jax 0.10 and 0.12). A matrix product with ones does not.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_WIDTH = 4096  # longest contraction known to keep its order of summation for every row count
_LANES = 8  # columns of ones: narrower products take another path in XLA:CPU


def row_sum(x: Float[Array, "*rows n"]) -> Float[Array, "*rows"]:
    """Sums over the last axis in float32, bit-equal for a row whatever rows stand beside it."""
    n = x.shape[-1]
    flat = x.astype(jnp.float32).reshape(-1, n)
    if n > _WIDTH:
        parts = -(-n // _WIDTH)
        flat = jnp.pad(flat, ((0, 0), (0, parts * _WIDTH - n))).reshape(-1, parts, _WIDTH)
        return row_sum(row_sum(flat)).reshape(x.shape[:-1])
    rows = flat.shape[0]
    if rows == 1:  # one row would take the matrix-vector path, which sums in another order
        flat = jnp.concatenate([flat, flat])
    ones = jnp.ones((_LANES, n), jnp.float32)
    sums = jax.lax.dot_general(
        flat, ones, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )
    return sums[:rows, 0].reshape(x.shape[:-1])


def row_mean_square(x: Float[Array, "*rows n"]) -> Float[Array, "*rows 1"]:
    """Mean of squares over the last axis, kept as an axis of one: what RMSNorm divides by."""
    x = x.astype(jnp.float32)
    return row_sum(x * x)[..., None] / x.shape[-1]
