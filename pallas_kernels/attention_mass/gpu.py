"""Attention mass on NVIDIA GPUs from Hopper on (Mosaic GPU): a walk over keys, without values.

The tiles of 64 query rows, the copies of pages and the masks are those of prefill attention
(`paged_attention.gpu`); the keys of a tile are cut into splits where tiles are few. A thread block
writes the column sums of each block of keys that it visits, and what its rows drew from each
segment; sums over tiles and heads are XLA's, always in one order: top-k over them must not depend
on which thread block came first.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.pallas_kernels import hopper
from kvjax.pallas_kernels.attention_mass.gpu_tiles import mass_of_tiles, scratch
from kvjax.pallas_kernels.attention_mass.result import AttentionMass
from kvjax.pallas_kernels.page_ops import LayerPages
from kvjax.pallas_kernels.page_ops.quantise import from_bits
from kvjax.pallas_kernels.paged_attention import gpu_rows
from kvjax.pallas_kernels.paged_attention.gpu import refuse
from kvjax.pallas_kernels.paged_attention.gpu_blocks import LOG2_E
from kvjax.pallas_kernels.paged_attention.gpu_walk import FIRST, LAST, Walk, require_fit
from kvjax.pallas_kernels.tuning import block_sizes, rule

_FILL = 264  # thread blocks that fill a GPU: two for each processor of an H100
_MOST = 64 * 1024 * 1024  # bytes of column sums that tiles leave before they are added up
_SEGMENTS = 64  # their sums stay in a warpgroup's registers
_NOTHING = 1e30  # an lse (in powers of two) beside which no score counts


def attention_mass(
    q, lse, pages: LayerPages, block_tables, query_starts, kv_lens, visible_lo, visible_hi, *,
    scale, segment_starts, tail_mask, soft_cap, value_width, interpret: Any = None,
) -> AttentionMass:  # fmt: skip
    """See `kvjax.pallas_kernels.attention_mass`. `interpret`: run in Mosaic GPU's interpreter."""
    refuse(q, pages, tail_mask, value_width)
    segments = 0 if segment_starts is None else segment_starts.shape[1] - 1
    if segments > _SEGMENTS:
        raise NotImplementedError(f"gpu: {segments} segments exceed {_SEGMENTS}")
    hopper.require(interpret)
    tables, starts, kv_lens, lo, hi = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.int32),
        (block_tables, query_starts, kv_lens, visible_lo, visible_hi),
    )
    tokens, owner = gpu_rows.tokens_of(q, pages.kv_heads, tail_mask, starts, kv_lens, lo, hi)
    call = _Call(tokens, pages, tables, segments, scale, soft_cap, interpret)
    edges = jnp.zeros((tables.shape[0], 1), jnp.int32)
    if segment_starts is not None:
        edges = jnp.asarray(segment_starts, jnp.int32)
    columns, drawn, first = call.run(jnp.asarray(lse, jnp.float32), edges)
    columns = columns[:, : tables.shape[1] * pages.page_size]
    if segment_starts is None:
        return AttentionMass(columns, None)
    place = jnp.arange(q.shape[0], dtype=jnp.int32) - starts[owner]
    tile = first[owner] + place // call.per_group
    rows = gpu_rows.collect(drawn, tile, place, call.group, call.per_group)
    real = jnp.arange(q.shape[0], dtype=jnp.int32) < starts[-1]
    drawn = jnp.sum(rows, axis=(1, 2))[:, :segments]
    return AttentionMass(columns, jnp.where(real[:, None], drawn, 0.0))


class _Call:
    """One call's arguments, cut into tiles of rows and splits of keys."""

    def __init__(self, tokens, pages, tables, segments, scale, soft_cap, interpret) -> None:
        self.tokens, self.tables, self.with_segments = tokens, tables, segments > 0
        self.heads, self.group, width = tokens.q.shape[1:]
        self.per_group = hopper.ROWS // self.group
        k, scales = from_bits(jnp.asarray(pages.k)), pages.k_scale
        self.pools = (k,) if scales is None else (k, jnp.asarray(scales))
        facts = {"head_dim": width, "page_size": pages.page_size, "bits": 8 * k.dtype.itemsize}
        sizes = block_sizes("attention_mass/gpu_keys", **facts)
        self.split = sizes["split"]
        self.walk = Walk(
            page_size=pages.page_size, width=width, v_width=max(8, -(-segments // 8) * 8),
            block=sizes["block"], stages=sizes["stages"], consumers=1, scale=scale,
            soft_cap=soft_cap, tail_words=tokens.tail.shape[1], stored=k.dtype,
            ahead=sizes["ahead"], latent=True, parts=1, share=self.heads // pages.kv_heads,
            interpret=interpret,
        )  # fmt: skip
        require_fit(self.walk, scratch(self.walk))

    def run(self, lse: Array, edges: Array) -> tuple[Array, Array, Array]:
        """Columns `[seqs, keys]`, `drawn[tiles, heads, 1, 64, segments]` and first tiles."""
        tokens, seqs = self.tokens, self.tables.shape[0]
        every = jnp.ones(seqs, bool)
        tiles, first = gpu_rows.cut(tokens, every, self.per_group)
        q, lo, hi, tail, bounds = gpu_rows.rows(tokens, tiles, 1, self.per_group)
        lse = gpu_rows.by_head(
            lse.reshape(-1, self.heads, self.group, 1), tiles, 1, self.per_group
        )[..., 0]  # fmt: skip
        counted = (lse > -jnp.inf) & (lo < hi)[:, None]
        rows = (q, jnp.where(counted, lse * LOG2_E, _NOTHING), lo, hi, tail, bounds)
        many = tiles.seq.shape[0]
        at_once = max(1, min(many, _MOST // (4 * self.heads * self._keys)))
        turns = -(-many // at_once)
        rows, seq = jax.tree.map(
            lambda x: jnp.pad(x, ((0, turns * at_once - many),) + ((0, 0),) * (x.ndim - 1)),
            (rows, tiles.seq),
        )

        def add(total: Array, part: Any) -> tuple[Array, Array]:
            rows, seq = part
            columns, drawn = self._tiles(rows, edges)
            mine = (seq == jnp.arange(seqs)[:, None]).astype(jnp.float32)
            return total + jnp.matmul(mine, columns, precision=jax.lax.Precision.HIGHEST), drawn

        total = jnp.zeros((seqs, self._keys), jnp.float32)
        if turns == 1:
            total, drawn = add(total, (rows, seq))
            return total, drawn, first
        parts = jax.tree.map(lambda x: x.reshape(turns, at_once, *x.shape[1:]), (rows, seq))
        total, drawn = jax.lax.scan(add, total, parts)
        return total, drawn.reshape(-1, *drawn.shape[2:]), first

    @property
    def _keys(self) -> int:
        """Keys of whole blocks that cover a sequence."""
        keys = self.tables.shape[1] * self.walk.page_size
        return -(-keys // self.walk.block) * self.walk.block

    def _tiles(self, rows: tuple[Array, ...], edges: Array) -> tuple[Array, Array]:
        """Sums over the heads of each tile's columns, and what its rows drew over all splits."""
        walk, bounds = self.walk, rows[-1]
        even = -(-self._keys * bounds.shape[0] * self.heads // _FILL)
        split = max(self.split, -(-even // walk.block) * walk.block)
        columns, drawn = mass_of_tiles(
            walk, *rows, edges, self.tables, *self.pools, split=split, num_keys=self._keys,
            with_segments=self.with_segments,
        )  # fmt: skip
        first, last = bounds[:, FIRST, None], bounds[:, LAST, None]
        block = jnp.arange(self._keys, dtype=jnp.int32) // walk.block * walk.block
        written = (block + walk.block > first) & (block < last) & (first < last)
        columns = jnp.sum(jnp.where(written[:, None], columns, 0.0), axis=1)
        part = jnp.arange(drawn.shape[2], dtype=jnp.int32) * split
        written = (part + split > first) & (part < last) & (first < last)
        drawn = jnp.where(written[:, None, :, None, None], drawn, 0.0)
        return columns, jnp.sum(drawn, axis=2, keepdims=True)


@rule("attention_mass/gpu_keys")
def _sizes(*, head_dim: int, page_size: int, bits: int) -> dict[str, int]:
    del page_size
    stages = 4 if bits == 16 else 2
    return {
        "block": 64,
        "stages": stages // (2 if head_dim > 256 else 1),
        "ahead": 2,
        "split": 1024,
    }
