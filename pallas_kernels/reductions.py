"""Row sums and an exponential that give a row the same bits in every batch.

XLA:CPU vectorises a plain reduction differently for different row counts, so a mean over 576
channels changes at 8 rows (measured on jax 0.10 and 0.12). A matrix product with ones does not.
Its `exp` changes in the last bit when it is fused with a small reduction, as in `exp(x - max(x))`.
"""

import jax
import jax.numpy as jnp
import numpy as np
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


LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # their sum is ln 2
_EXP_TERMS = (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def exp_parts(x: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """`(fraction, power)`: `exp(x) = fraction * 2**power`, power whole, fraction in [0.7, 1.42].

    Range reduction by powers of two and a polynomial of degree 7 on [-ln 2 / 2, ln 2 / 2] (the
    coefficients of Cephes `expf`, Moshier 1987): multiplications and additions only, so no choice
    of library routine, and none of its vector width, enters the result.
    """
    power = whole_power(x)
    r = (x - power * LN2_HIGH) - power * LN2_LOW
    y = jnp.full_like(r, np.float32(1.9875691500e-4))
    for term in _EXP_TERMS:
        y = y * r + np.float32(term)
    return y * r * r + r + 1, power


def whole_power(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The `power` of `exp_parts`: the whole number nearest to `x / ln 2`."""
    return jnp.round(x * np.float32(1.4426950408889634))


def power_of_two(n: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Float32 `2**n` for whole `n <= 127`, exact; 0 below -126.

    A product with it is exact, so it gives the same bits whether or not LLVM contracts it with an
    addition behind it, which it decides differently for a vector and for its scalar remainder.
    """
    n = jnp.maximum(n, np.float32(-127)).astype(jnp.int32)
    return jax.lax.bitcast_convert_type((n + 127) << 23, jnp.float32)


def steady_exp(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Float32 `exp(x)` for `x <= 88`, to 2e-7 relative; 0 below -87.7; NaN stays NaN.

    Bits depend on `x` alone. (A product that is added to something may still be contracted: see
    `power_of_two`.)
    """
    fraction, power = exp_parts(jnp.maximum(x, np.float32(-88)))  # 2**-127 stands for zero below
    return fraction * power_of_two(power)
