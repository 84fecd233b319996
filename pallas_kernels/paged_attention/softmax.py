"""Mask and online-softmax arithmetic shared by the backends: pure functions of blocks of scores.

`NEVER` stands in for minus infinity: finite, so that a row that has seen nothing yet stays free of
NaN. A block that a row cannot see leaves the row's state unchanged, bit for bit, so results do not
depend on how many such blocks a batch makes the row walk through.

The state keeps its maximum as a whole power of two, so that rescaling is exact. Rescaling by
`exp(old - new)` would round, and LLVM contracts `l * fade + added` into one rounding for some
shapes and not for others (seen on jax 0.12 with 7 rows against 56).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from kvjax.pallas_kernels.reductions import (
    LN2_HIGH,
    LN2_LOW,
    exp_parts,
    power_of_two,
    row_sum,
    whole_power,
)

NEVER = -1e30


class Softmax(NamedTuple):
    """Running maximum, normaliser and weighted values of each row, all float32.

    The row's sum of exponentials is `l * 2**m`, its sum of weighted values `acc * 2**m`.
    """

    m: Array  # [..., rows, 1], whole numbers
    l: Array  # [..., rows, 1]
    acc: Array  # [..., rows, v_width]


def start(shape: tuple[int, ...], v_width: int) -> Softmax:
    """The state before any key; `shape` ends with the rows."""
    return Softmax(
        jnp.full((*shape, 1), NEVER, jnp.float32),
        jnp.zeros((*shape, 1), jnp.float32),
        jnp.zeros((*shape, v_width), jnp.float32),
    )


def visible(
    keys: Int[Array, " keys"],
    lo: Int[Array, " rows"],
    hi: Int[Array, " rows"],
    kv_len: Int[Array, "..."],
    tail_mask: UInt32[Array, "rows words"] | None,
) -> Bool[Array, "rows keys"]:
    """Which keys (by index) each row may attend to. `kv_len` broadcasts against the rows."""
    seen = (keys >= lo[:, None]) & (keys < jnp.minimum(hi, kv_len)[:, None])
    if tail_mask is None:
        return seen
    words = tail_mask.shape[1]
    bit = keys[None, :] - (jnp.broadcast_to(kv_len, lo.shape) - 32 * words)[:, None]
    word = jnp.take_along_axis(tail_mask, jnp.clip(bit // 32, 0, words - 1), axis=1)
    allowed = (word >> (jnp.maximum(bit, 0) % 32).astype(jnp.uint32)) & 1
    return seen & ((bit < 0) | (allowed == 1))


def _apart(x: Any) -> Any:
    """`x`, computed once and on its own: XLA neither fuses across nor repeats it in each consumer.

    What it holds back is contraction, which would tie bits to shapes, and a polynomial evaluated
    three times. Mosaic TPU has no rule for the barrier; a kernel there needs another definition.
    """
    return jax.lax.optimization_barrier(x)


def capped(scores: Array, soft_cap: float | None) -> Array:
    """`soft_cap * tanh(scores / soft_cap)`, or the scores themselves."""
    if soft_cap is None:
        return scores
    return _apart(soft_cap * jnp.tanh(scores / soft_cap))


def absorb(
    state: Softmax,
    scores: Float[Array, "*b rows keys"],
    mask: Bool[Array, "*b rows keys"],
    values: Float[Array, "*b keys v_width"],
) -> Softmax:
    """Takes one block of keys into the running softmax. `values` of unseen keys must be finite."""
    top = jnp.max(jnp.where(mask, scores, NEVER), axis=-1, keepdims=True)
    m = jnp.maximum(state.m, whole_power(top))  # rounding is monotonic: no key has a larger power
    fraction, power = exp_parts(scores)
    p = _apart(jnp.where(mask, fraction * power_of_two(power - m), 0.0))
    fade = power_of_two(state.m - m)
    added = _weighted_values(p.astype(values.dtype), values)
    return Softmax(m, state.l * fade + row_sum(p)[..., None], state.acc * fade + added)


def _weighted_values(
    p: Float[Array, "*b rows keys"], values: Float[Array, "*b keys v_width"]
) -> Float[Array, "*b rows v_width"]:
    """`p @ values`, in products of 64 or 128 columns.

    With other widths XLA:CPU sums in another order for few rows than for many (measured on 32, 80,
    96, 256 and 512 columns), and a row's bits would depend on its batch.
    """
    batch = tuple(range(p.ndim - 2))
    width = values.shape[-1]
    pieces = []
    for first in range(0, width, 128):
        piece = values[..., first : first + 128]
        missing = (64 if piece.shape[-1] <= 64 else 128) - piece.shape[-1]
        if missing:
            piece = jnp.pad(piece, ((0, 0),) * (piece.ndim - 1) + ((0, missing),))
        product = jax.lax.dot_general(
            p,
            piece,
            (((p.ndim - 1,), (piece.ndim - 2,)), (batch, batch)),
            precision=jax.lax.Precision.HIGHEST if values.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        pieces.append(product)
    return jnp.concatenate(pieces, axis=-1)[..., :width]


def finish(state: Softmax, sinks: Float[Array, "*b rows"] | None) -> tuple[Array, Array]:
    """Output `[..., rows, v_width]` and lse `[..., rows]`; rows without keys give 0 and -inf."""
    m, l, acc = state
    if sinks is not None:
        fraction, power = exp_parts(sinks[..., None])
        top = jnp.maximum(m, power)
        fade = power_of_two(m - top)
        m, l, acc = top, l * fade + fraction * power_of_two(power - top), acc * fade
    empty = l == 0.0
    l = jnp.where(empty, 1.0, l)
    log_l = _apart(jnp.log(l))
    lse = jnp.where(empty, -jnp.inf, m * LN2_HIGH + (m * LN2_LOW + log_l))
    return acc * (1.0 / l), lse[..., 0]
