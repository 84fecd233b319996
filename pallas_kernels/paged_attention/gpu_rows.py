"""From tokens to tiles of query rows and back, for the Mosaic GPU kernels.

A row is one token and one of the query heads that share a KV head; a warpgroup takes 64 of them,
`64 // group` whole tokens. A tile is `consumers` warpgroups and belongs to one sequence.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.pallas_kernels.hopper import ROWS

_NO_KEY = jnp.iinfo(jnp.int32).max


class Tokens(NamedTuple):
    """The query tokens of a call, as both kernels need them."""

    q: Array  # [tokens, kv_heads, group, width]
    lo: Array  # [tokens]
    hi: Array  # [tokens], within the sequence's length
    tail: Array  # [tokens, words], int32
    starts: Array  # [seqs + 1]
    kv_lens: Array  # [seqs]


def tokens_of(
    q: Any, kv_heads: int, tail_mask: Any, starts: Array, kv_lens: Array, lo: Array, hi: Array
) -> tuple[Tokens, Array]:
    """The tokens of a call, and the sequence of each.

    Where more than 64 query heads share a KV head, tiles of fewer read that head several times:
    `q` has as many heads as `kv_heads` times those tiles.
    """
    total, q_heads, width = q.shape
    whole = q_heads // kv_heads
    share = next(n for n in range(1, whole + 1) if whole % n == 0 and whole <= n * ROWS)
    owner = owners(starts, total)
    words = jnp.zeros((total, 0), jnp.uint32) if tail_mask is None else jnp.asarray(tail_mask)
    q = jnp.asarray(q).astype(jnp.bfloat16).reshape(total, -1, whole // share, width)
    tail = jax.lax.bitcast_convert_type(words, jnp.int32)
    return Tokens(q, lo, jnp.minimum(hi, kv_lens[owner]), tail, starts, kv_lens), owner


class Tiles(NamedTuple):
    """Which token each row of each tile is. `first[tile]` is the tile's first token."""

    seq: Array  # [tiles]
    first: Array  # [tiles]
    length: Array  # [tiles], tokens of the tile; 0: an unused tile


def one_per_sequence(tokens: Tokens, wanted: Array) -> Tiles:
    """A tile for every sequence; those not `wanted` get no tokens."""
    seqs = wanted.shape[0]
    count = jnp.where(wanted, jnp.diff(tokens.starts), 0)
    return Tiles(jnp.arange(seqs, dtype=jnp.int32), tokens.starts[:-1], count)


def cut(tokens: Tokens, wanted: Array, size: int) -> tuple[Tiles, Array]:
    """Tiles of `size` tokens of the `wanted` sequences, and the first tile of each sequence."""
    total, seqs = tokens.q.shape[0], wanted.shape[0]
    lens = jnp.where(wanted, jnp.diff(tokens.starts), 0)
    edges = jnp.cumulative_sum(-(-lens // size), include_initial=True).astype(jnp.int32)
    tile = jnp.arange(total // size + min(seqs, total), dtype=jnp.int32)
    seq = jnp.searchsorted(edges, tile, side="right").astype(jnp.int32) - 1
    seq = jnp.clip(seq, 0, seqs - 1)
    done = (tile - edges[seq]) * size
    count = jnp.where(tile < edges[-1], jnp.clip(lens[seq] - done, 0, size), 0)
    return Tiles(seq, tokens.starts[seq] + done, count), edges[:-1]


def rows(tokens: Tokens, tiles: Tiles, consumers: int, per_group: int) -> tuple[Array, ...]:
    """`q, lo, hi, tail, bounds` of the kernels; `per_group` tokens go to one warpgroup."""
    n, group = tiles.seq.shape[0], tokens.q.shape[2]
    place, token = _tokens_in(tiles, consumers * per_group, tokens.q.shape[0])
    live = place < tiles.length[:, None]
    lo, hi = tokens.lo[token], tokens.hi[token]
    live = live & (lo < hi)
    lo, hi = jnp.where(live, lo, 0), jnp.where(live, hi, 0)

    def spread(x: Array) -> Array:
        """A number per token as one per row, with 0 in the rows left over."""
        x = jnp.repeat(x.reshape(n, consumers, per_group), group, axis=2)
        return jnp.pad(x, ((0, 0), (0, 0), (0, ROWS - group * per_group)))

    q = by_head(tokens.q, tiles, consumers, per_group)
    words = tokens.tail.shape[1]
    tail = [spread(tokens.tail[token, i]) for i in range(words)] or [spread(lo)]
    kv_len = tokens.kv_lens[tiles.seq]
    dense_hi = jnp.min(jnp.where(live, hi, _NO_KEY), axis=1)
    if words:
        dense_hi = jnp.minimum(dense_hi, kv_len - 32 * words)
    bounds = jnp.stack(
        [
            tiles.seq,
            kv_len,
            jnp.min(jnp.where(live, lo, _NO_KEY), axis=1),
            jnp.max(hi, axis=1),
            jnp.max(lo, axis=1),
            jnp.maximum(dense_hi, 0),
        ],
        axis=1,
    )
    return q, spread(lo), spread(hi), jnp.stack(tail, axis=2), bounds.astype(jnp.int32)


def by_head(x: Array, tiles: Tiles, consumers: int, per_group: int) -> Array:
    """`x[tokens, kv_heads, group, width]` as rows `[tiles, kv_heads, consumers, 64, width]`.

    Rows left over are zero; rows past a tile's tokens are those of some other token.
    """
    _, kv_heads, group, width = x.shape
    _, token = _tokens_in(tiles, consumers * per_group, x.shape[0])
    x = x[token].reshape(-1, consumers, per_group, kv_heads, group, width)
    x = x.transpose(0, 3, 1, 2, 4, 5).reshape(-1, kv_heads, consumers, per_group * group, width)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, ROWS - per_group * group), (0, 0)))


def _tokens_in(tiles: Tiles, size: int, total: int) -> tuple[Array, Array]:
    """Places in a tile, and the token at each place of each tile."""
    place = jnp.arange(size, dtype=jnp.int32)
    return place, jnp.clip(tiles.first[:, None] + place, 0, total - 1)


def collect(x: Any, tile: Array, place: Array, group: int, per_group: int) -> Array:
    """The rows of token `place[t]` of tile `tile[t]`: `[tokens, kv_heads, group, ...]`.

    `x` is `[tiles, kv_heads, consumers, rows, ...]`.
    """
    tiles, kv_heads, consumers = x.shape[:3]
    x = x[:, :, :, : per_group * group]
    x = x.reshape(tiles, kv_heads, consumers, per_group, group, *x.shape[4:])
    tile = jnp.clip(tile, 0, tiles - 1)
    return x[tile, :, place // per_group % consumers, place % per_group]


def owners(starts: Array, total: int) -> Array:
    """The sequence of each token; padding tokens take the last."""
    t = jnp.arange(total, dtype=jnp.int32)
    owner = jnp.searchsorted(starts, t, side="right").astype(jnp.int32) - 1
    return jnp.clip(owner, 0, starts.shape[0] - 2)
