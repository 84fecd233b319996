"""`x @ w.T` through XLA, in the forms that XLA:CPU runs fast.

Measured on XLA:CPU: one bfloat16 or int8 row falls to a scalar loop, 10 to 25 times slower than two
rows; a weight converted in front of a dot is never fused into it. So a single row is doubled, and
int8 weights meet int8 activations (quantised per row) with an int32 accumulator.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.pallas_kernels.linear import Activation, Panels, gate, quantise_rows


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
    x: Array, w: Array | Panels, scale: Array | None, *, pad_single_row: bool = True
) -> Array:
    """See `kvjax.pallas_kernels.linear`."""
    if isinstance(w, Panels):
        raise NotImplementedError("xla: the weights are packed for the cpu kernel")
    rows = x.shape[0]
    if scale is None:
        x = x.astype(w.dtype)
        if pad_single_row:
            x = _at_least_two_rows(x)
        return _dot(x, w, jnp.dtype(jnp.float32))[:rows]
    q, x_scale = quantise_rows(_at_least_two_rows(x))
    y = _dot(q, w, jnp.dtype(jnp.int32)).astype(jnp.float32)
    return (y * x_scale.reshape(x_scale.shape[0], *(1,) * (w.ndim - 1)) * scale)[:rows]


def gated_linear(
    x: Array,
    w: Array | Panels,
    scale: Array | None,
    *,
    activation: Activation,
    pad_single_row: bool = True,
) -> Array:
    """See `kvjax.pallas_kernels.gated_linear`."""
    y = linear(x, w, scale, pad_single_row=pad_single_row)
    return gate(y[:, 0], y[:, 1], activation)
