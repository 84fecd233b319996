"""Attention mass as a Mosaic TPU kernel: a walk over the keys of packed pages, without values.

The items, tiles and page buffers are those of prefill attention (`paged_attention.tpu_prefill`).
Items come in token order, so those of one sequence follow each other: its columns stay in VMEM
until the next sequence begins. What the kernel does on a TPU is unproved: it is compiled for TPUs
ahead of time and runs in interpret mode.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kvjax.pallas_kernels import compat
from kvjax.pallas_kernels.attention_mass.result import AttentionMass
from kvjax.pallas_kernels.page_ops import PackedPages
from kvjax.pallas_kernels.paged_attention.tpu import geometry, queries, refuse
from kvjax.pallas_kernels.paged_attention.tpu_items import Items
from kvjax.pallas_kernels.paged_attention.tpu_stream import (
    SEQUENTIAL,
    Geometry,
    PageStream,
    product,
)
from kvjax.pallas_kernels.paged_attention.tpu_tiles import Tiling, chunk_bounds, visible_rows

_COLUMN_BYTES = 4 * 1024 * 1024  # of VMEM for the columns of one sequence


def attention_mass(
    q, lse, pages: PackedPages, block_tables, query_starts, kv_lens, visible_lo, visible_hi, *,
    scale, segment_starts, tail_mask, soft_cap, value_width, interpret: Any = False,
) -> AttentionMass:  # fmt: skip
    """See `kvjax.pallas_kernels.attention_mass`. `interpret` is that of `pl.pallas_call`."""
    refuse(pages, block_tables, interpret)
    q, lse, tables, starts, kv_lens, lo, hi = jax.tree.map(
        jnp.asarray, (q, lse, block_tables, query_starts, kv_lens, visible_lo, visible_hi)
    )
    tokens, q_heads, _ = q.shape
    seqs, num_keys = tables.shape[0], tables.shape[1] * pages.page_size
    if 4 * num_keys > _COLUMN_BYTES:
        raise NotImplementedError(
            f"tpu: columns of {num_keys} keys exceed the {_COLUMN_BYTES} bytes kept for them"
        )
    words = 0 if tail_mask is None else tail_mask.shape[1]
    g = geometry(pages, q_heads, value_width, words, soft_cap, False, interpret, tables.shape[1])
    tail = jnp.zeros((tokens, 0), jnp.int32)
    if tail_mask is not None:
        tail = jax.lax.bitcast_convert_type(jnp.asarray(tail_mask), jnp.int32)
    tiling = Tiling(g, starts, kv_lens, lo, hi, tail, least=1)
    columns, drawn = _mass(
        g, tiling, tables, tiling.chunks(queries(g, q, scale)),
        tiling.chunks(lse.astype(jnp.float32).reshape(tokens, g.kv_heads, g.group, 1)),
        _edges(segment_starts, seqs), pages, segment_starts is not None,
    )  # fmt: skip
    columns = columns.reshape(seqs, -1)[:, :num_keys]
    columns = jnp.where(tiling.has_item[:, None], columns, 0)
    if segment_starts is None:
        return AttentionMass(columns, None)
    drawn = drawn[:tokens, : segment_starts.shape[1] - 1]
    return AttentionMass(columns, jnp.where(tiling.visited[:, None], drawn, 0))


def _edges(segment_starts: Array | None, seqs: int) -> Array:
    """`[seqs, 8, lanes]`: first index and end of each segment in rows 0 and 1; empty beyond."""
    if segment_starts is None:
        return jnp.zeros((seqs, 8, 128), jnp.int32)
    starts = jnp.asarray(segment_starts)
    edges = jnp.stack([starts[:, :-1], starts[:, 1:]], axis=1)
    return jnp.pad(edges, ((0, 0), (0, 6), (0, -edges.shape[2] % 128)))


class _Walk:
    """The refs of one grid step and what is done with them."""

    def __init__(self, geometry: Geometry, chunk: int, with_segments: bool, refs) -> None:
        n = len(Items._fields)
        self.geometry, self.chunk, self.with_segments = geometry, chunk, with_segments
        self.items = Items(*refs[:n])
        (
            # scalars: [S, P], [chunks], [chunks]
            tables, self.chunk_lo, self.chunk_hi,
            # inputs: [chunks per tile, kv_heads, rows, q_lanes], [..., 1], [tile, 2 + words] of lo,
            # hi and mask words, [1, 8, segments] of first index and end, pool, scales
            self.q, self.lse, self.rows, self.edges, pool, scales,
            # outputs: [1, blocks, block], [tile, segments]
            self.columns, self.drawn,
            *buffers,
        ) = refs[n:]  # fmt: skip
        self.stream = PageStream(geometry, self.items, tables, pool, scales, buffers)
        self.i = pl.program_id(0)

    def run(self) -> None:
        """One item; a sequence's first clears its columns, a tile's first what its rows drew."""
        i, items = self.i, self.items
        before = jnp.maximum(i - 1, 0)

        @pl.when(i == 0)
        def _():
            self.stream.prime()

        @pl.when((i == 0) | (items.seq[before] != items.seq[i]))
        def _():
            self.columns[...] = jnp.zeros_like(self.columns)

        @pl.when((i == 0) | (items.tile[before] != items.tile[i]))
        def _():
            self.drawn[...] = jnp.zeros_like(self.drawn)

        self.stream.walk(i, self._block, 0)

    def _block(self, first_key, slot, carry):
        g, per_tile = self.geometry, self.q.shape[0]
        first = self.items.tile[self.i] * per_tile  # chunks before this tile
        begin = self.items.begin[self.i] // self.chunk - first
        end = pl.cdiv(self.items.end[self.i], self.chunk) - first

        def add(c, _):
            meets = self.chunk_lo[first + c] < first_key + g.block
            meets &= self.chunk_hi[first + c] > first_key

            @pl.when(meets)
            def _():
                self._add(c, (first + c) * self.chunk, first_key, slot)

            return 0

        jax.lax.fori_loop(begin, end, add, 0)
        return carry

    def _add(self, c, first_token, first_key, slot) -> None:
        """Adds what the tokens of chunk `c` give the keys of one block."""
        g, stream, chunk = self.geometry, self.stream, self.chunk
        at = pl.ds(c * chunk, chunk)
        rows = self.rows[at, :]
        mask = visible_rows(g, self.items, self.i, rows, first_token, first_key, g.group)
        p = jnp.zeros((g.group * chunk, g.block), jnp.float32)
        for h in range(g.kv_heads):
            scores = product(self.q[c, h], stream.keys(slot, h), (-1, -1))
            if g.scaled:
                scores *= stream.scale_row(slot, h)
            if g.soft_cap is not None:
                scores = g.soft_cap * jnp.tanh(scores / g.soft_cap)
            lse = self.lse[c, h]
            counted = mask & (lse > -jnp.inf)
            p += jnp.where(counted, jnp.exp(scores - jnp.where(lse > -jnp.inf, lse, 0.0)), 0.0)
        p = functools.reduce(jnp.add, (p[j * chunk : (j + 1) * chunk] for j in range(g.group)))
        block = pl.ds(first_key // g.block, 1)
        self.columns[0, block, :] += jnp.sum(p, axis=0, keepdims=True)
        if self.with_segments:
            keys = first_key + jax.lax.broadcasted_iota(jnp.int32, (g.block, 1), 0)
            edges = self.edges[0]
            inside = (keys >= edges[0:1]) & (keys < edges[1:2])
            self.drawn[at, :] += product(p, inside.astype(jnp.float32), (-1, -2))


def _body(*refs, geometry: Geometry, chunk: int, with_segments: bool) -> None:
    _Walk(geometry, chunk, with_segments, refs).run()


def _mass(
    g: Geometry, tiling: Tiling, tables, q, lse, edges, pages: PackedPages, with_segments: bool
) -> list[Array]:  # fmt: skip
    """Columns `[seqs, blocks, block]` and drawn `[T', segments]`.

    Columns of sequences without an item and rows of tiles without one are left unwritten.
    """
    tile, chunk, items = tiling.tile, tiling.chunk, tiling.items
    blocks = -(-tables.shape[1] * g.page_size // g.block)
    scales = jnp.zeros((1, 8, 128), jnp.float32) if pages.scale is None else pages.scale
    pool = compat.in_hbm(pages.kv, g.interpret)
    scales = compat.in_hbm(scales, g.interpret)

    def of(field: str, *shape: int) -> pl.BlockSpec:
        """The part of an array that belongs to the item's tile, or to its sequence."""
        rest = (0,) * (len(shape) - 1)
        return pl.BlockSpec(
            shape, lambda i, *s: (getattr(Items(*s[: len(items)]), field)[i], *rest)
        )

    per_tile = (tile // chunk, *q.shape[1:3])
    scored = 2 * q.shape[0] * q.shape[1] * q.shape[2] * tables.shape[1] * g.page_size
    return pl.pallas_call(
        functools.partial(_body, geometry=g, chunk=chunk, with_segments=with_segments),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(items) + 3,
            grid=(items.used[0],),
            in_specs=[
                of("tile", *per_tile, g.q_lanes),
                of("tile", *per_tile, 1),
                of("tile", tile, tiling.rows.shape[1]),
                of("seq", 1, *edges.shape[1:]),
                pl.BlockSpec(memory_space=compat.HBM),
                pl.BlockSpec(memory_space=compat.HBM),
            ],
            out_specs=[
                of("seq", 1, blocks, g.block),
                of("tile", tile, edges.shape[2]),
            ],
            scratch_shapes=PageStream.scratch(g, pool.dtype, (scales.shape[1], scales.shape[2])),
        ),
        out_shape=[
            jax.ShapeDtypeStruct((tables.shape[0], blocks, g.block), jnp.float32),
            jax.ShapeDtypeStruct((tiling.rows.shape[0], edges.shape[2]), jnp.float32),
        ],
        compiler_params=SEQUENTIAL,
        cost_estimate=pl.CostEstimate(
            flops=scored * g.q_lanes,
            bytes_accessed=-(-q.shape[0] * chunk // tile)
            * blocks
            * g.block
            * g.kv_heads
            * g.lanes
            * pool.dtype.itemsize,
            transcendentals=scored // 2,
        ),
        interpret=g.interpret,
        name="attention_mass",
    )(*items, tables, *chunk_bounds(tiling.rows, chunk), q, lse, tiling.rows, edges, pool, scales)
