"""`x @ w.T` for weights stored `[..., in]`, in the forms that XLA:CPU runs fast.

Measured on XLA:CPU: one bfloat16 or int8 row falls to a scalar loop, 10 to 25 times slower than two
rows; a weight converted in front of a dot is never fused into it. So a single row is doubled, and
int8 weights meet int8 activations (quantised per row) with an int32 accumulator.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8


def _dot(x: Array, w: Array, out: jnp.dtype) -> Array:
    flat = w.reshape(-1, w.shape[-1])  # with several output axes XLA:CPU sums in another order
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    y = jax.lax.dot_general(
        x, flat, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=out
    )
    return y.reshape(x.shape[0], *w.shape[:-1])


def _at_least_two_rows(x: Array) -> Array:
    return jnp.concatenate([x, x]) if x.shape[0] == 1 else x


def linear(
    x: Float[Array, "rows in_"], w: Float[Array, "*out in_"], *, pad_single_row: bool = True
) -> Float[Array, "rows *out"]:
    """Float32 `x @ w.T`, computed in the dtype of `w` with float32 accumulation.

    `pad_single_row=False` keeps one row one row: faster for float32 on CPU, but then a request's
    bits depend on whether it runs alone.
    """
    rows = x.shape[0]
    x = x.astype(w.dtype)
    if pad_single_row:
        x = _at_least_two_rows(x)
    return _dot(x, w, jnp.dtype(jnp.float32))[:rows]


def quantise_rows(
    x: Float[Array, "*rows n"],
) -> tuple[Int8[Array, "*rows n"], Float[Array, "*rows 1"]]:
    """Symmetric int8 with one float32 scale per row: `x ~ q * scale`."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-8) / 127
    return jnp.round(x / scale).astype(jnp.int8), scale


def int8_linear(
    x: Float[Array, "rows in_"], w: Int8[Array, "*out in_"], w_scale: Float[Array, "*out"]
) -> Float[Array, "rows *out"]:
    """Float32 `x @ (w * w_scale).T` through int8 x int8 -> int32; `x` is quantised per row."""
    rows = x.shape[0]
    q, scale = quantise_rows(_at_least_two_rows(x))
    y = _dot(q, w, jnp.dtype(jnp.int32)).astype(jnp.float32)
    return (y * scale.reshape(scale.shape[0], *(1,) * (w.ndim - 1)) * w_scale)[:rows]
