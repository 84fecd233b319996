"""Query tokens in tiles and chunks, as the Mosaic TPU bodies for several tokens want them.

A tile is a run of the flat token array whose items walk their keys one after another. A chunk is a
few of its tokens: with the query heads of one KV head they are the rows of one matrix product.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.pallas_kernels.paged_attention.blockwise import tail_allows
from kvjax.pallas_kernels.paged_attention.tpu_items import Items, prefill_items
from kvjax.pallas_kernels.paged_attention.tpu_stream import Geometry
from kvjax.pallas_kernels.tuning import block_sizes, rule

_TILE_BYTES = 16 * 1024 * 1024  # of VMEM for the queries and results of a prefill tile


def power_of_two(n: int) -> int:
    """The largest power of two up to `n`."""
    return 1 << max(n, 1).bit_length() - 1


@rule("paged_attention/tpu_prefill")
def _prefill_sizes(group: int, bytes_per_token: int) -> dict[str, int]:
    """Query tokens per tile and per chunk: about 128 rows a product, a tile that fits VMEM.

    The tokens of a chunk are rows beside each other, so there are whole registers of 8, or one.
    """
    chunk = 1 if group >= 64 else max(8, power_of_two(128 // group))
    return {"tile": min(128, power_of_two(_TILE_BYTES // bytes_per_token)), "chunk": chunk}


def prefill_sizes(g: Geometry, tokens: int) -> tuple[int, int]:
    """Query tokens per tile and per chunk, powers of two."""
    rows = g.kv_heads * g.group
    per_token = 2 * rows * (g.q_lanes * g.q_dtype.itemsize + 4 * g.v_lanes + 4 * 128 * 2)
    sizes = block_sizes("paged_attention/tpu_prefill", group=g.group, bytes_per_token=per_token)
    return max(8, sizes["chunk"], min(sizes["tile"], 2 * power_of_two(tokens))), sizes["chunk"]


class Tiling:
    """The tokens of one call: `rows[T', 2 + words]` of `visible_lo`, `visible_hi` (cut to the
    sequence) and tail mask, padded to whole tiles, and the `items` that visit them.

    `least`: sequences with fewer tokens have no item.
    """

    def __init__(self, g: Geometry, starts, kv_lens, lo, hi, tail, *, least: int = 2) -> None:
        tokens = lo.shape[0]
        self.tile, self.chunk = prefill_sizes(g, tokens)
        self._padding, self._heads = -tokens % self.tile, (g.kv_heads, g.group)
        token = jnp.arange(tokens, dtype=jnp.int32)
        owner = jnp.searchsorted(starts, token, side="right").astype(jnp.int32) - 1
        owner = jnp.clip(owner, 0, kv_lens.shape[0] - 1)
        real = token < starts[-1]
        hi = jnp.where(real, jnp.minimum(hi, kv_lens[owner]), 0)
        rows = jnp.concatenate([lo[:, None], hi[:, None], tail], axis=1)
        self.rows = jnp.pad(rows, ((0, self._padding), (0, 0)))
        self.items = prefill_items(
            starts, kv_lens, self.rows[:, 0], self.rows[:, 1], g.tail_words, g.block, self.tile,
            least=least,
        )  # fmt: skip
        self.has_item = jnp.diff(starts) >= least  # by sequence
        self.visited = real & self.has_item[owner]  # by token

    def chunks(self, x: Array) -> Array:
        """`[T, kv_heads, group, width]` to `[T' / chunk, kv_heads, group * chunk, width]`."""
        x = jnp.pad(x, ((0, self._padding),) + ((0, 0),) * 3)
        x = x.reshape(-1, self.chunk, *x.shape[1:]).transpose(0, 2, 3, 1, 4)
        return x.reshape(x.shape[0], self._heads[0], -1, x.shape[-1])

    def by_token(self, x: Array) -> Array:
        """Back from `chunks`; tokens that no item visits get zeros."""
        x = x.reshape(x.shape[0], *self._heads, self.chunk, x.shape[-1]).transpose(0, 3, 1, 2, 4)
        x = x.reshape(-1, *x.shape[2:])[: self.visited.shape[0]]
        return jnp.where(self.visited[:, None, None, None], x, 0)


def chunk_bounds(rows: Array, chunk: int) -> tuple[Array, Array]:
    """Per chunk, the keys `[lo, hi)` outside of which none of its tokens sees one."""
    lo, hi = rows[:, 0].reshape(-1, chunk), rows[:, 1].reshape(-1, chunk)
    return lo.min(axis=1), hi.max(axis=1)


def visible_rows(
    g: Geometry, items: Items, i, rows: Array, first_token, first_key, copies: int
) -> Array:
    """Mask `[copies * chunk, block]`: which keys from `first_key` on the tokens of a chunk see.

    `rows[chunk, 2 + words]` are theirs; tokens that are not of item `i` see nothing.
    """
    token = first_token + jax.lax.broadcasted_iota(jnp.int32, (rows.shape[0], 1), 0)
    ours = (token >= items.begin[i]) & (token < items.end[i])
    hi = jnp.where(ours, rows[:, 1:2], 0)
    rows = jnp.concatenate([rows] * copies)
    hi = jnp.concatenate([hi] * copies)
    keys = first_key + jax.lax.broadcasted_iota(jnp.int32, (1, g.block), 1)
    mask = (keys >= rows[:, 0:1]) & (keys < hi)
    if g.tail_words:
        mask &= tail_allows(keys, rows[:, 2:], items.tail[i], first_key)
    return mask
