"""Paged attention as XLA loops over fixed-size key blocks: any platform, the default on CPU.

Two bodies. *Decode* takes the sequences that bring one token and walks their keys together, block
by block. *Prefill* cuts the longer ones into tiles of query tokens, each tile of one sequence, and
walks only the blocks that the tile can see. Trip counts are dynamic, so neither reads keys that
nobody sees, and the shapes inside do not depend on context lengths. Every row reduces in blocks of
`BLOCK` keys counted from the start of its sequence: its bits are the same in every batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.pallas_kernels.page_ops.packing import split_scales
from kvjax.pallas_kernels.page_ops.pages import LayerPages, PackedPages, Pages, decode_dtype
from kvjax.pallas_kernels.page_ops.quantise import decode
from kvjax.pallas_kernels.paged_attention.softmax import absorb, capped, finish, start, visible

# Keys per block. On CPU 512 measured 8 % slower and 128 8 % faster, but with 128 the bits of some
# head shapes depend on the batch.
BLOCK = 256
TILE = 128  # query tokens per prefill tile: 64 measured 10 % slower at long contexts on CPU


def paged_attention(
    q, pages: Pages, block_tables, query_starts, kv_lens, visible_lo, visible_hi, *,
    scale, tail_mask=None, soft_cap=None, sinks=None, value_width=None, max_query_len=None,
    return_lse=False,
):  # fmt: skip
    """See `kvjax.pallas_kernels.paged_attention`."""
    block_tables = whole_blocks(supported(pages), block_tables)
    attend = _Attend(q, pages, block_tables, query_starts, kv_lens, visible_lo, visible_hi,
                     scale, tail_mask, soft_cap, sinks, value_width)  # fmt: skip
    if max_query_len == 1:
        out, lse = attend.decode()
    else:
        out, lse = attend.prefill()
    return (out, lse) if return_lse else out


def supported(pages: Pages) -> Pages:
    """The pages, or NotImplementedError."""
    if pages.page_size > BLOCK or BLOCK % pages.page_size:
        raise NotImplementedError(f"xla: page_size={pages.page_size} does not divide {BLOCK}")
    return pages


def whole_blocks(pages: Pages, block_tables: Array) -> Array:
    """Block tables padded to a multiple of the pages of a block."""
    missing = -block_tables.shape[1] % (BLOCK // pages.page_size)
    return jnp.pad(block_tables, ((0, 0), (0, missing)))


def load_keys(pages: Pages, tables: Array, c: Array, width: int) -> Array:
    """Numbers of the keys in block `c` of each table row, `[n, kv_heads, BLOCK, width]`."""
    ids = _block_ids(pages, tables, c)
    if isinstance(pages, LayerPages):
        return decode(_load(pages.k, ids), _load(pages.k_scale, ids))
    scale = _load_scales(pages, ids)
    scale = None if scale is None else scale[:, : pages.kv_heads]
    return decode(_load(pages.kv, ids)[..., :width], scale)


def load_block(
    pages: Pages, tables: Array, c: Array, width: int, value_width: int | None
) -> tuple[Array, Array]:
    """Keys and values of block `c`; with a `value_width` these are leading channels of those."""
    if value_width is not None:
        k = load_keys(pages, tables, c, width)
        return k, k[..., :value_width]
    ids = _block_ids(pages, tables, c)
    if isinstance(pages, LayerPages):
        v = decode(_load(pages.v, ids), _load(pages.v_scale, ids))
        return load_keys(pages, tables, c, width), v
    rows, scale = _load(pages.kv, ids), _load_scales(pages, ids)
    k_scale, v_scale = split_scales(scale, pages.kv_heads, False)
    half = rows.shape[-1] // 2  # queries, keys and values of packed pages are equally wide
    return decode(rows[..., :width], k_scale), decode(rows[..., half : half + width], v_scale)


def _block_ids(pages: Pages, tables: Array, c: Array) -> Array:
    per_block = BLOCK // pages.page_size
    return jax.lax.dynamic_slice(tables, (0, c * per_block), (tables.shape[0], per_block))


def _load(pool: Any, ids: Array) -> Any:
    """Pages `ids[n, per_block]` of a pool side by side, `[n, heads, BLOCK, ..]`."""
    if pool is None:
        return None
    x = pool[ids].swapaxes(1, 2)
    return x.reshape(x.shape[0], x.shape[1], BLOCK, *x.shape[4:])


def _load_scales(pages: PackedPages, ids: Array) -> Array | None:
    """Scales of packed pages `[n, rows, BLOCK]`."""
    if pages.scale is None:
        return None
    x = pages.scale[ids][..., : pages.page_size].swapaxes(1, 2)
    return x.reshape(x.shape[0], x.shape[1], BLOCK)


def scores(q: Array, k: Array, soft_cap: float | None) -> Array:
    """Float32 `[n, heads, rows, keys]` of `q[n, heads, rows, d]` and `k[n, heads, keys, d]`."""
    products = jax.lax.dot_general(
        q, k, (((3,), (3,)), ((0, 1), (0, 1))),
        precision=jax.lax.Precision.HIGHEST if k.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return capped(products, soft_cap)


class _Attend:
    """The arguments of one call, with what both bodies derive from them."""

    def __init__(
        self, q, pages, block_tables, query_starts, kv_lens, lo, hi,
        scale, tail_mask, soft_cap, sinks, value_width,
    ) -> None:  # fmt: skip
        # numpy arguments are fine, but cannot be indexed by what is traced in the loops below
        pages, block_tables, query_starts, kv_lens, lo, hi = jax.tree.map(
            jnp.asarray, (pages, block_tables, query_starts, kv_lens, lo, hi)
        )
        tokens, q_heads, self.k_width = q.shape
        self.kv_heads = pages.kv_heads
        self.group = q_heads // self.kv_heads
        self.value_width = value_width
        if value_width is not None:
            self.v_width = value_width
        else:
            self.v_width = self.k_width if isinstance(pages, PackedPages) else pages.v.shape[3]
        self.dtype = decode_dtype(pages)
        q = (q.astype(jnp.float32) * scale).astype(self.dtype)
        self.q = q.reshape(tokens, self.kv_heads, self.group, self.k_width)
        self.pages, self.block_tables, self.query_starts = pages, block_tables, query_starts
        self.kv_lens, self.lo, self.hi = kv_lens, lo, hi
        self.tail_mask, self.soft_cap = tail_mask, soft_cap
        self.sinks = None if sinks is None else sinks.reshape(self.kv_heads, self.group)

    def _block(self, tables: Array, c: Array, alive: Array) -> tuple[Array, Array]:
        """Keys and values of block `c` of each table row, `[n, kv_heads, BLOCK, width]`.

        `alive[n, BLOCK]` marks the slots that some row may see; the values elsewhere become zero,
        so that whatever they hold cannot reach a result.
        """
        k, v = load_block(self.pages, tables, c, self.k_width, self.value_width)
        return k, jnp.where(alive[:, None, :, None], v, 0)

    def _scores(self, q: Array, k: Array) -> Array:
        return scores(q, k, self.soft_cap)

    def decode(self) -> tuple[Array, Array]:
        """Sequences of one token: token t belongs to the last that starts at or before t."""
        tokens = self.q.shape[0]
        owner = _owners(self.query_starts, tokens)
        real = jnp.arange(tokens, dtype=jnp.int32) < self.query_starts[-1]
        hi = jnp.where(real, self.hi, 0)
        out, lse = self._decode_rows(
            self.q, self.block_tables[owner], self.kv_lens[owner], self.lo, hi, self.tail_mask
        )
        return out.reshape(tokens, -1, self.v_width), lse.reshape(tokens, -1)

    def _decode_rows(self, q, tables, kv_lens, lo, hi, tail_mask) -> tuple[Array, Array]:
        """Row n of `q[n, kv_heads, group, d]` attends over row n of `tables`."""
        n = q.shape[0]
        if self.group == 1:  # a product of one row sums in another order than one of many
            q = jnp.concatenate([q, q], axis=2)
        hi = jnp.minimum(hi, kv_lens)
        lo = jnp.where(lo < hi, lo, hi)
        first = jnp.min(jnp.where(lo < hi, lo, jnp.iinfo(jnp.int32).max)) // BLOCK

        def body(c, state):
            keys = c * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
            mask = visible(keys, lo, hi, kv_lens, tail_mask)
            k, v = self._block(tables, c, mask)
            scores = self._scores(q, k)
            return absorb(state, scores, jnp.broadcast_to(mask[:, None, None], scores.shape), v)

        state = start((n, self.kv_heads, q.shape[2]), self.v_width)
        state = jax.lax.fori_loop(first, -(-jnp.max(hi) // BLOCK), body, state)
        state = jax.tree.map(lambda x: x[:, :, : self.group], state)
        return finish(state, None if self.sinks is None else self.sinks[None])

    def prefill(self) -> tuple[Array, Array]:
        """Any mix: tiles for sequences of several tokens, the decode body for those of one."""
        tokens, starts = self.q.shape[0], self.query_starts
        lens = jnp.diff(starts)
        single = lens == 1
        tile = min(TILE, tokens)
        tiles = jnp.where(single, 0, -(-lens // tile))
        bounds = jnp.cumulative_sum(tiles, include_initial=True)

        padded = self._padded(tile)
        out = jnp.zeros((tokens + tile, self.kv_heads, self.group, self.v_width), jnp.float32)
        lse = jnp.zeros((tokens + tile, self.kv_heads, self.group), jnp.float32)

        def body(j, carry):
            s = jnp.searchsorted(bounds, j, side="right").astype(jnp.int32) - 1
            first = starts[s] + (j - bounds[s]) * tile
            o, e = self._tile(padded, s, first, tile)
            # rows past the sequence are overwritten by the next tile, which starts right there
            return (
                jax.lax.dynamic_update_slice(carry[0], o, (first, 0, 0, 0)),
                jax.lax.dynamic_update_slice(carry[1], e, (first, 0, 0)),
            )

        out, lse = jax.lax.fori_loop(0, bounds[-1], body, (out, lse))
        out, lse = self._merge_singles(out, lse, single)
        return out[:tokens].reshape(tokens, -1, self.v_width), lse[:tokens].reshape(tokens, -1)

    def _padded(self, tile: int) -> tuple[Array, Array, Array, Array | None]:
        """Queries, intervals and mask with `tile` rows more, so that a tile may start anywhere."""

        def pad(x):
            return jnp.pad(x, ((0, tile),) + ((0, 0),) * (x.ndim - 1))

        mask = None if self.tail_mask is None else pad(self.tail_mask)
        return pad(self.q), pad(self.lo), pad(self.hi), mask

    def _tile(self, padded, s, first, tile: int) -> tuple[Array, Array]:
        """Output and lse of the `tile` query rows from `first` on, all of sequence `s`."""
        q, lo, hi, tail_mask = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, first, tile), padded
        )
        ours = first + jnp.arange(tile, dtype=jnp.int32) < self.query_starts[s + 1]
        hi = jnp.where(ours, jnp.minimum(hi, self.kv_lens[s]), 0)
        lo = jnp.where(ours & (lo < hi), lo, hi)
        lowest = jnp.min(jnp.where(lo < hi, lo, jnp.iinfo(jnp.int32).max))
        highest = jnp.max(hi)
        rows = q.transpose(1, 0, 2, 3).reshape(1, self.kv_heads, tile * self.group, self.k_width)
        table = jax.lax.dynamic_slice_in_dim(self.block_tables, s, 1)

        def body(c, state):
            keys = c * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
            mask = visible(keys, lo, hi, self.kv_lens[s], tail_mask)
            k, v = self._block(table, c, jnp.any(mask, axis=0)[None])
            scores = self._scores(rows, k)
            mask = jnp.broadcast_to(
                mask[None, None, :, None], (1, self.kv_heads, tile, self.group, BLOCK)
            )
            return absorb(state, scores, mask.reshape(scores.shape), v)

        state = start((1, self.kv_heads, tile * self.group), self.v_width)
        state = jax.lax.fori_loop(lowest // BLOCK, -(-highest // BLOCK), body, state)
        sinks = self.sinks
        if sinks is not None:
            sinks = jnp.broadcast_to(sinks[:, None], (self.kv_heads, tile, self.group))
            sinks = sinks.reshape(1, self.kv_heads, -1)
        o, e = finish(state, sinks)
        o = o.reshape(self.kv_heads, tile, self.group, self.v_width).swapaxes(0, 1)
        return o, e.reshape(self.kv_heads, tile, self.group).swapaxes(0, 1)

    def _merge_singles(self, out: Array, lse: Array, single: Array) -> tuple[Array, Array]:
        """Adds the rows of the sequences that bring one token, through the decode body."""
        at = jnp.minimum(self.query_starts[:-1], self.q.shape[0] - 1)
        hi = jnp.where(single, self.hi[at], 0)
        tail_mask = None if self.tail_mask is None else self.tail_mask[at]
        o, e = self._decode_rows(
            self.q[at], self.block_tables, self.kv_lens, self.lo[at], hi, tail_mask
        )
        at = jnp.where(single, at, out.shape[0])
        return out.at[at].set(o, mode="drop"), lse.at[at].set(e, mode="drop")


def _owners(query_starts: Array, tokens: int) -> Array:
    """The sequence of each token; padding tokens take the last."""
    t = jnp.arange(tokens, dtype=jnp.int32)
    owner = jnp.searchsorted(query_starts, t, side="right").astype(jnp.int32) - 1
    return jnp.clip(owner, 0, query_starts.shape[0] - 2)
