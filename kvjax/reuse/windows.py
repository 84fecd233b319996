"""Chosen tokens grouped into windows, so that what is run again hangs together (CacheClip)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool


def group_windows(chosen: Bool[Array, " n"], size: int, least: int) -> Bool[Array, " n"]:
    """Every window `[s, s + size)` with at least `least` chosen tokens, whole; nothing else.

    Windows end with the array.
    """
    n = chosen.shape[0]
    at = jnp.arange(n)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(chosen.astype(jnp.int32))])
    dense = before[jnp.minimum(at + size, n)] - before[at] >= least
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(dense.astype(jnp.int32))])
    return starts[at + 1] - starts[jnp.maximum(0, at + 1 - size)] > 0


def most_grouped(count: int, size: int, least: int) -> int:
    """How many tokens windows cover at most with `count` chosen ones: `2 size / least - 1` each.

    Windows that cover the same can be thinned out until every other one is disjoint: m windows then
    hold at least `m least / 2` chosen tokens, and cover each other wherever they share one, so they
    cover `m (size - least) + count` at most.
    """
    return count * (2 * size - least) // least
