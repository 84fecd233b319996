"""The prefill body on Mosaic TPU: tiles of query tokens, a few of them per matrix product.

A tile is a run of the flat token array, whatever sequences lie in it. Its running softmax stays in
VMEM while the items of the tile, one per sequence, walk their keys one after another; rows of other
sequences see nothing meanwhile and stay as they are. Inside a tile, *chunks* of a few tokens with
all the query heads of one KV head are the rows of one product, and a chunk that cannot see a block
skips it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kvjax.pallas_kernels import compat
from kvjax.pallas_kernels.paged_attention.blockwise import absorb, finish
from kvjax.pallas_kernels.paged_attention.softmax import NEVER, Softmax
from kvjax.pallas_kernels.paged_attention.tpu_items import Items
from kvjax.pallas_kernels.paged_attention.tpu_stream import (
    SEQUENTIAL,
    Geometry,
    PageStream,
    product,
)
from kvjax.pallas_kernels.paged_attention.tpu_tiles import chunk_bounds, visible_rows


class _Tile:
    """The refs of one grid step and what is done with them."""

    def __init__(self, geometry: Geometry, chunk: int, refs) -> None:
        n = len(Items._fields)
        self.geometry, self.chunk = geometry, chunk
        self.items = Items(*refs[:n])
        (
            # scalars: [S, P], [chunks], [chunks]
            tables, self.chunk_lo, self.chunk_hi,
            # inputs: [chunks per tile, kv_heads, rows, q_lanes], [tile, 2 + words] of lo, hi and
            # mask words, [kv_heads, rows, 1], pool, scales
            self.q, self.rows, self.sinks, pool, scales,
            # outputs: [chunks per tile, kv_heads, rows, v_lanes], if wanted [..., 1]
            self.o, *self.lse,
            # scratch: running maximum and sum, [chunks per tile, kv_heads, rows, 1]; pages
            self.m, self.l, kv, kv_scales, arrived,
        ) = refs[n:]  # fmt: skip
        buffers = kv, kv_scales, arrived
        self.stream = PageStream(geometry, self.items, tables, pool, scales, buffers)
        self.i = pl.program_id(0)

    def run(self) -> None:
        """One item; the tile's first clears its softmax, the last writes the results."""
        i, items = self.i, self.items
        before, after = jnp.maximum(i - 1, 0), jnp.minimum(i + 1, items.used[0] - 1)

        @pl.when(i == 0)
        def _():
            self.stream.prime()

        @pl.when((i == 0) | (items.tile[before] != items.tile[i]))
        def _():
            self.m[...] = jnp.full_like(self.m, NEVER)
            self.l[...] = jnp.zeros_like(self.l)
            self.o[...] = jnp.zeros_like(self.o)

        self.stream.walk(i, self._block, 0)

        @pl.when((after == i) | (items.tile[after] != items.tile[i]))
        def _():
            jax.lax.fori_loop(0, self.q.shape[0], self._finish, 0)

    def _chunks(self) -> tuple[Any, Any]:
        """The range of chunks in which this item has tokens."""
        first = self.items.tile[self.i] * (self.q.shape[0] * self.chunk)
        begin, end = self.items.begin[self.i] - first, self.items.end[self.i] - first
        return begin // self.chunk, pl.cdiv(end, self.chunk)

    def _visible(self, c, first_key, copies: int) -> Array:
        """Mask `[copies * chunk, block]` of chunk `c`; rows of other sequences see nothing."""
        rows = self.rows[pl.ds(c * self.chunk, self.chunk), :]
        token = (self.items.tile[self.i] * self.q.shape[0] + c) * self.chunk
        return visible_rows(self.geometry, self.items, self.i, rows, token, first_key, copies)

    def _block(self, first_key, slot, carry):
        g = self.geometry
        begin, end = self._chunks()

        @pl.when(self.stream.may_hold_garbage(self.i, first_key))
        def _():
            def seen(c, alive):
                mask = self._visible(c, first_key, 1).astype(jnp.float32)
                return jnp.maximum(alive, jnp.max(mask, axis=0, keepdims=True))

            alive = jax.lax.fori_loop(begin, end, seen, jnp.zeros((1, g.block), jnp.float32))
            self.stream.clear_values(slot, alive)

        chunks_before = self.items.tile[self.i] * self.q.shape[0]

        def attend(c, _):
            at = chunks_before + c
            meets = (self.chunk_lo[at] < first_key + g.block) & (self.chunk_hi[at] > first_key)

            @pl.when(meets)
            def _():
                mask = self._visible(c, first_key, g.group)
                for h in range(g.kv_heads):
                    self._absorb(c, h, slot, mask)

            return 0

        jax.lax.fori_loop(begin, end, attend, 0)
        return carry

    def _absorb(self, c, h: int, slot, mask: Array) -> None:
        g, stream = self.geometry, self.stream
        scores = product(self.q[c, h], stream.keys(slot, h), (-1, -1))
        if g.scaled:
            scores *= stream.scale_row(slot, h)
        if g.soft_cap is not None:
            scores = g.soft_cap * jnp.tanh(scores / g.soft_cap)

        def weigh(p):
            if g.scaled:
                p = jnp.where(mask, p * stream.scale_row(slot, g.value_scale_row + h), 0.0)
            values = stream.values(slot, h)
            return product(p.astype(values.dtype), values, (-1, -2))

        state = Softmax(self.m[c, h], self.l[c, h], self.o[c, h])
        self.m[c, h], self.l[c, h], self.o[c, h] = absorb(state, scores, mask, weigh)

    def _finish(self, c, carry):
        for h in range(self.geometry.kv_heads):
            state = Softmax(self.m[c, h], self.l[c, h], self.o[c, h])
            self.o[c, h], lse = finish(state, self.sinks[h])
            for ref in self.lse:
                ref[c, h] = lse
        return carry


def _body(*refs, geometry: Geometry, chunk: int) -> None:
    _Tile(geometry, chunk, refs).run()


def prefill(
    geometry: Geometry, items: Items, tables, q, rows, sinks, pool, scales, cost: Any, *,
    tile: int, chunk: int,
) -> list[Array]:  # fmt: skip
    """`q[T / chunk, kv_heads, group * chunk, q_lanes]` to `[..., v_lanes]`, lse to `[..., 1]`.

    `rows[T, 2 + words]` holds `visible_lo`, `visible_hi` (cut to the sequence) and the tail mask;
    `tile` is a multiple of `chunk`, T of `tile`. Rows of tiles without an item are left unwritten.
    """
    g = geometry
    per_tile, shape = tile // chunk, q.shape[:3]
    chunk_lo, chunk_hi = chunk_bounds(rows, chunk)

    def of_tile(*shape: int) -> pl.BlockSpec:
        rest = (0,) * (len(shape) - 1)
        return pl.BlockSpec(shape, lambda i, *s: (Items(*s[: len(items)]).tile[i], *rest))

    block = (per_tile, *shape[1:])
    widths = [g.v_lanes, 1][: 1 + g.with_lse]
    return pl.pallas_call(
        functools.partial(_body, geometry=g, chunk=chunk),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(items) + 3,
            grid=(items.used[0],),
            in_specs=[
                of_tile(*block, g.q_lanes),
                of_tile(tile, rows.shape[1]),
                pl.BlockSpec(sinks.shape, lambda i, *_: (0, 0, 0)),
                pl.BlockSpec(memory_space=compat.HBM),
                pl.BlockSpec(memory_space=compat.HBM),
            ],
            out_specs=[of_tile(*block, width) for width in widths],
            scratch_shapes=(
                pltpu.VMEM((*block, 1), jnp.float32),
                pltpu.VMEM((*block, 1), jnp.float32),
                *PageStream.scratch(g, pool.dtype, scales.shape[1:]),
            ),
        ),
        out_shape=[jax.ShapeDtypeStruct((*shape, width), jnp.float32) for width in widths],
        compiler_params=SEQUENTIAL,
        cost_estimate=cost,
        interpret=g.interpret,
        name="paged_attention_prefill",
    )(*items, tables, chunk_lo, chunk_hi, q, rows, sinks, pool, scales)
