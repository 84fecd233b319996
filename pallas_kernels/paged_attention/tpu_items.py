"""Work items of the Mosaic TPU bodies: which rows meet which keys, as small integer arrays.

An item is a run of query tokens of one sequence that share one walk over that sequence's keys: one
token (decode), or the tokens that a sequence has in one tile of the flat token array (prefill).
The arrays are computed by XLA in front of the kernel and live in its scalar memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

_FAR = jnp.iinfo(jnp.int32).max


class Items(NamedTuple):
    """One entry per item, int32 `[items]`; an item that sees nothing has `lo == hi`."""

    seq: Array  # row of the block tables
    lo: Array  # the keys that some row may see lie in [lo, hi)
    hi: Array
    whole_lo: Array  # every key in [whole_lo, whole_hi) is seen by some row
    whole_hi: Array
    tail: Array  # index of bit 0 of the tail mask
    begin: Array  # flat token range [begin, end)
    end: Array
    tile: Array  # tile of the flat token array
    following: Array  # next item that sees something, or the number of items
    parity: Array  # buffer of the item's first block
    used: Array  # [1]: items in use


def _links(lo: Array, hi: Array, block: int) -> tuple[Array, Array]:
    """`following` and `parity` of items that see `[lo, hi)`, in blocks of `block` keys."""
    n = lo.shape[0]
    at = jnp.where(lo < hi, jnp.arange(n, dtype=jnp.int32), n)
    later = jax.lax.cummin(at, reverse=True)
    following = jnp.append(later[1:], n).astype(jnp.int32)
    blocks = jnp.where(lo < hi, -(-hi // block) - lo // block, 0)
    return following, ((jnp.cumsum(blocks) - blocks) % 2).astype(jnp.int32)


def decode_items(starts, kv_lens, lo, hi, tail_words: int, block: int) -> Items:
    """One item per sequence; only sequences of one token have work."""
    seqs = kv_lens.shape[0]
    single = jnp.diff(starts) == 1
    at = jnp.minimum(starts[:-1], lo.shape[0] - 1)
    hi = jnp.where(single, jnp.minimum(hi[at], kv_lens), 0)
    lo = jnp.where(lo[at] < hi, jnp.maximum(lo[at], 0), hi)
    tail = kv_lens - 32 * tail_words
    following, parity = _links(lo, hi, block)
    order = jnp.arange(seqs, dtype=jnp.int32)
    return Items(
        seq=order, lo=lo, hi=hi,
        whole_lo=lo, whole_hi=jnp.minimum(hi, tail) if tail_words else hi,
        tail=tail, begin=at, end=at + 1, tile=order, following=following, parity=parity,
        used=jnp.full((1,), seqs, jnp.int32),
    )  # fmt: skip


def prefill_items(
    starts, kv_lens, lo, hi, tail_words: int, block: int, tile: int, *, least: int = 2
) -> Items:
    """Pairs of a sequence of at least `least` tokens and a tile, in token order.

    A tile of tokens may hold several sequences, and then has several items one after another.
    `lo` and `hi` are padded to whole tiles.
    """
    tokens = lo.shape[0]
    first, last = starts[:-1], starts[1:] - 1
    tiles = jnp.where(jnp.diff(starts) >= least, last // tile - first // tile + 1, 0)
    bounds = jnp.cumsum(tiles)
    # a sequence adds at most one tile that it shares with its predecessor
    limit = tokens // tile + min(starts.shape[0] - 1, tokens // least)
    i = jnp.arange(limit, dtype=jnp.int32)
    seq = jnp.searchsorted(bounds, i, side="right").astype(jnp.int32)
    real = i < bounds[-1]
    seq = jnp.minimum(seq, starts.shape[0] - 2)
    number = jnp.where(real, first[seq] // tile + i - (bounds[seq] - tiles[seq]), 0)
    begin = jnp.where(real, jnp.maximum(first[seq], number * tile), 0)
    end = jnp.where(real, jnp.minimum(last[seq] + 1, (number + 1) * tile), 0)

    token = number[:, None] * tile + jnp.arange(tile, dtype=jnp.int32)
    ours = (token >= begin[:, None]) & (token < end[:, None])
    rows_hi = jnp.where(ours, jnp.minimum(hi[token], kv_lens[seq][:, None]), 0)
    rows_lo = jnp.where(ours, jnp.maximum(lo[token], 0), 0)
    sees = rows_lo < rows_hi
    lowest = jnp.min(jnp.where(sees, rows_lo, _FAR), axis=1)
    highest = jnp.max(jnp.where(sees, rows_hi, 0), axis=1)
    lowest = jnp.minimum(lowest, highest)
    widest = jnp.argmax(jnp.where(sees, rows_hi - rows_lo, -1), axis=1)[:, None]
    whole_lo = jnp.take_along_axis(rows_lo, widest, axis=1)[:, 0]
    whole_hi = jnp.take_along_axis(rows_hi, widest, axis=1)[:, 0]
    tail = kv_lens[seq] - 32 * tail_words
    following, parity = _links(lowest, highest, block)
    return Items(
        seq=seq, lo=lowest, hi=highest,
        whole_lo=whole_lo, whole_hi=jnp.minimum(whole_hi, tail) if tail_words else whole_hi,
        tail=tail, begin=begin, end=end, tile=number, following=following, parity=parity,
        used=jnp.maximum(bounds[-1:], 1).astype(jnp.int32),
    )  # fmt: skip
