"""Mask and online softmax of one block of keys, for kernel bodies that walk their keys in order.

The arithmetic of `softmax.py` without what only XLA:CPU needs: the running maximum is a plain
float, the sum a plain sum. A block that a row cannot see leaves the row's state unchanged, bit for
bit: its maximum stays, it fades by exp(0) = 1, and it is added zeros.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.pallas_kernels.paged_attention.softmax import NEVER, Softmax


def absorb(
    state: Softmax,
    scores: Float[Array, "*b rows keys"],
    mask: Bool[Array, "*#b rows keys"],
    weigh: Callable[[Array], Array],
) -> Softmax:
    """Takes one block of keys into the state; `weigh(p)` is `p @ values`, `[*b, rows, v_width]`.

    The exact running maximum and sum of Milakov and Gimelshein (arXiv 1805.02867, section 3).
    """
    top = jnp.max(jnp.where(mask, scores, NEVER), axis=-1, keepdims=True)
    m = jnp.maximum(state.m, top)
    p = jnp.where(mask, jnp.exp(scores - m), 0.0)
    fade = jnp.exp(state.m - m)
    l = state.l * fade + jnp.sum(p, axis=-1, keepdims=True)
    return Softmax(m, l, state.acc * fade + weigh(p))


def finish(state: Softmax, sinks: Float[Array, "*b rows 1"] | None) -> tuple[Array, Array]:
    """Output `[*b, rows, v_width]` and lse `[*b, rows, 1]`; rows without keys give 0 and -inf."""
    m, l, acc = state
    if sinks is not None:
        top = jnp.maximum(m, sinks)
        fade = jnp.exp(m - top)
        m, l, acc = top, l * fade + jnp.exp(sinks - top), acc * fade
    empty = l == 0.0
    l = jnp.where(empty, 1.0, l)
    return acc / l, jnp.where(empty, -jnp.inf, m + jnp.log(l))


def tail_allows(
    keys: Int[Array, "#rows keys"],
    words: Int[Array, "rows words"],
    tail: Int[Array, ""],
    first_key: Int[Array, ""],
) -> Bool[Array, "rows keys"]:
    """Which of a block's keys the tail mask lets through; those before the tail always pass.

    `keys` count up from `first_key`; bit 0 of word 0 is index `tail`. Only the words that meet the
    block are looked at.
    """
    rows, num_words = words.shape
    bit = jnp.broadcast_to(keys - tail, (rows, keys.shape[1]))
    lane = jax.lax.broadcasted_iota(jnp.int32, words.shape, 1)

    def pick(w, got):
        word = jnp.sum(jnp.where(lane == w, words, 0), axis=1, keepdims=True)
        return jnp.where(bit >> 5 == w, word, got)

    first = jnp.maximum((first_key - tail) >> 5, 0)
    last = jnp.minimum((first_key + keys.shape[1] - 1 - tail) >> 5, num_words - 1)
    got = jax.lax.fori_loop(first, last + 1, pick, jnp.full_like(bit, -1))
    return (got >> (bit & 31)) & 1 == 1
