"""The Mosaic GPU kernel of attention mass: one tile of query rows against one split of its keys."""

import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kvjax.pallas_kernels.compat import mosaic_gpu as plgpu
from kvjax.pallas_kernels.hopper import ROWS
from kvjax.pallas_kernels.paged_attention.gpu_blocks import LOG2_E, capped, visible
from kvjax.pallas_kernels.paged_attention.gpu_loads import load_blocks, load_rows, streams
from kvjax.pallas_kernels.paged_attention.gpu_walk import (
    DENSE_HI,
    DENSE_LO,
    FIRST,
    KV_LEN,
    LAST,
    SEQ,
    Walk,
)

_RING = 2  # blocks of column sums on their way to memory


def scratch(walk: Walk) -> dict[str, Any]:
    """Shared memory and barriers."""
    return walk.scratch() | {
        "columns_smem": plgpu.SMEM((_RING, walk.block), jnp.float32),
        "lse_ready": plgpu.Barrier(),
    }


def mass_of_tiles(
    walk: Walk, q: Any, lse: Any, lo: Any, hi: Any, tail: Any, bounds: Any, edges: Any,
    tables: Any, *pools: Any, split: int, num_keys: int, with_segments: bool,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Column sums and segment sums of every tile, over the rows of a KV head.

    `q` is `[tiles, heads, 1, 64, width]`; `lse`, `[tiles, heads, 1, 64]`, is in powers of two and
    huge for rows that do not count. `edges[seqs, segments + 1]` are the segments.

    Returns `columns[tiles, heads, num_keys]`, unwritten in blocks without a visible key, and
    `drawn[tiles, heads, splits, 64, segments]`, whose last axis is padded to a multiple of 8 and
    which is unwritten in splits without one.
    """
    tiles, heads = q.shape[:2]
    splits = -(-num_keys // split)

    def attention_mass(q, lse, lo, hi, tail, bounds, edges, tables, *refs, **shared):
        *held, columns, drawn = refs
        part, head = jax.lax.axis_index("split"), jax.lax.axis_index("head")
        tile = jax.lax.axis_index("tile")
        first = jnp.maximum(bounds[tile, FIRST], part * split)
        last = jnp.minimum(bounds[tile, LAST], (part + 1) * split)
        seq, s = bounds[tile, SEQ], types.SimpleNamespace(**shared)
        blocks = jax.lax.div(first, walk.block), jax.lax.div(last + walk.block - 1, walk.block)
        w = jax.lax.axis_index("warpgroup")

        @pl.when((first < last) & (w == 1))
        def _load():
            walk.group.registers(88 if walk.scaled else 40, "decrease")
            load_rows(walk, s, q.at[tile, head], lo.at[tile], hi.at[tile], tail.at[tile])
            plgpu.copy_gmem_to_smem(lse.at[tile, head, 0], s.lse_smem.at[0], s.lse_ready)
            load_blocks(
                walk, streams(walk, s, held), lambda i: tables[seq, i],
                jax.lax.div(head, walk.share), blocks, (first, last),
            )  # fmt: skip

        @pl.when((first < last) & (w == 0))
        def _add():
            walk.group.registers(184 if walk.scaled else 232, "increase")
            dense = (
                jax.lax.div(bounds[tile, DENSE_LO] + walk.block - 1, walk.block),
                jax.lax.div(bounds[tile, DENSE_HI], walk.block),
            )
            segments = (lambda i: edges[seq, i], edges.shape[1] - 1) if with_segments else None
            acc = _walk_blocks(
                walk, s, bounds[tile, KV_LEN], blocks, dense, segments, columns.at[tile, head]
            )
            if with_segments:
                _write_drawn(walk, s, acc, drawn.at[tile, head, part])
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        attention_mass,
        out_type=(
            jax.ShapeDtypeStruct((tiles, heads, num_keys), jnp.float32),
            jax.ShapeDtypeStruct((tiles, heads, splits, ROWS, walk.v_width), jnp.float32),
        ),
        scratch_types=scratch(walk),
        grid=(splits, heads, tiles),
        grid_names=("split", "head", "tile"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=walk.interpret,
    )(q, lse, lo, hi, tail, bounds, edges, tables, *pools)


def _walk_blocks(
    walk: Walk, s: Any, kv_len: Any, blocks: Any, dense: Any, segments: Any, columns: Any
) -> Any:
    """Writes the column sums of each block; returns the segment sums of each row."""
    g = walk.group
    plgpu.barrier_wait(s.rows_ready)
    plgpu.barrier_wait(s.lse_ready)
    lse = g.by_row(s.lse_smem.at[0])

    def step(block: Any, acc: Any, masked: bool) -> Any:
        turn = block - blocks[0]
        stage, slot = jax.lax.rem(turn, walk.stages), jax.lax.rem(turn, _RING)
        plgpu.barrier_wait(s.k_ready.at[stage])
        scores = g.scores(s.q_smem.at[0], s.k_smem.at[stage])
        plgpu.barrier_arrive(s.k_free.at[stage])
        scores = capped(scores, walk) * LOG2_E
        p = jnp.exp2(scores - jax.lax.broadcast_in_dim(lse, scores.shape, [0]))
        if masked:
            p = jnp.where(visible(walk, s, 0, block * walk.block, kv_len), p, 0.0)
        plgpu.wait_smem_to_gmem(_RING - 1, wait_read_only=True)
        s.columns_smem.at[slot][...] = p.sum(axis=0)
        plgpu.commit_smem()
        start = pl.multiple_of(block * walk.block, walk.block)
        plgpu.copy_smem_to_gmem(s.columns_smem.at[slot], columns.at[pl.ds(start, walk.block)])
        return acc if segments is None else _drawn(walk, p, block * walk.block, segments, acc)

    def masked(block: Any, acc: Any) -> Any:
        return step(block, acc, True)

    def unmasked(block: Any, acc: Any) -> Any:
        return step(block, acc, False)

    low = jnp.clip(dense[0], blocks[0], blocks[1])
    high = jnp.clip(dense[1], low, blocks[1])
    acc = g.full((ROWS, walk.v_width), 0.0) if segments is not None else 0
    acc = jax.lax.fori_loop(blocks[0], low, masked, acc)
    acc = jax.lax.fori_loop(low, high, unmasked, acc)
    return jax.lax.fori_loop(high, blocks[1], masked, acc)


def _drawn(walk: Walk, p: Any, first: Any, segments: Any, acc: Any) -> Any:
    """`acc[rows, segments]` with the sums of `p` over those of the segments that a block meets."""
    g, (edge, count) = walk.group, segments

    def meets(i: Any, met: Any) -> Any:
        before = (edge(i + 1) <= first).astype(jnp.int32)
        begun = (edge(i) < first + walk.block).astype(jnp.int32)
        return met[0] + before, met[1] + begun

    begin, end = jax.lax.fori_loop(0, count, meets, (jnp.int32(0), jnp.int32(0)))
    keys = g.iota(p.shape, 1) + first
    column = g.iota(acc.shape, 1)

    def add(i: Any, acc: Any) -> Any:
        inside = (keys >= edge(i)) & (keys < edge(i + 1))
        share = jnp.where(inside, p, 0.0).sum(axis=1)
        share = jax.lax.broadcast_in_dim(share, acc.shape, [0])
        return acc + jnp.where(column == i, share, 0.0)

    return jax.lax.fori_loop(begin, end, add, acc)


def _write_drawn(walk: Walk, s: Any, acc: Any, drawn: Any) -> None:
    columns = walk.o_columns
    for start in range(0, walk.v_width, columns):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        s.o_smem.at[0][...] = acc[:, start : start + columns]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(s.o_smem.at[0], drawn.at[:, pl.ds(start, columns)])
