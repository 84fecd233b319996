"""How one warpgroup of a Mosaic GPU kernel brings pages into shared memory for the others.

A *stream* is the keys, or the values, of one sequence and KV head. It ends in a ring of bfloat16
blocks, which the other warpgroups multiply; two barriers per block pass it back and forth: `ready`
when it has been filled, `free` when it has been read. Pages in bfloat16 are copied there by TMA.
Scaled pages (int8, float8) are copied as they are into a second ring, which runs ahead, and this
warpgroup multiplies them by their scales on the way from one ring to the other: what multiplies
them further never knows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kvjax.pallas_kernels.compat import mosaic_gpu as plgpu
from kvjax.pallas_kernels.compat import store
from kvjax.pallas_kernels.hopper import ROWS
from kvjax.pallas_kernels.paged_attention.gpu_walk import Walk


class Stream(NamedTuple):
    """Keys or values on their way; the last four are None where pages hold bfloat16."""

    pool: Any  # [pages, kv_heads, page_size, width], in HBM
    blocks: Any  # [stages, block, width], bfloat16
    ready: Any
    free: Any
    pool_scale: Any = None  # f32[pages, kv_heads, page_size], in HBM
    stored: Any = None  # [ahead, block, width], as the pool stores them
    scales: Any = None  # f32[ahead, block]
    landed: Any = None


def streams(walk: Walk, s: Any, pools: Any) -> list[Stream]:
    """The keys and, unless latent, the values of `pools`, in which their scales follow."""
    names = ("k",) if walk.latent else ("k", "v")
    made = []
    for i, name in enumerate(names):
        what = ("smem", "ready", "free")
        ring = Stream(pools[i], *(getattr(s, f"{name}_{x}") for x in what))
        if walk.scaled:
            ring = ring._replace(
                pool_scale=pools[len(names) + i], stored=getattr(s, f"{name}_stored"),
                scales=getattr(s, f"{name}_scales"), landed=getattr(s, f"{name}_landed"),
            )  # fmt: skip
        made.append(ring)
    return made


def load_rows(walk: Walk, s: Any, q: Any, lo: Any, hi: Any, tail: Any) -> None:
    """Starts the copies of a tile's query rows; each ref begins with the consumers."""
    for w in range(walk.consumers):
        plgpu.copy_gmem_to_smem(q.at[w], s.q_smem.at[w], s.rows_ready)
        seen = [lo.at[w], hi.at[w], *(tail.at[w, i] for i in range(walk.tail_words))]
        for i, row in enumerate(seen):
            plgpu.copy_gmem_to_smem(row, s.seen_smem.at[w, i], s.rows_ready)


def load_blocks(
    walk: Walk, streams: list[Stream], page_id: Any, head: Any, blocks: Any, keys: Any
) -> None:
    """Brings blocks `[blocks[0], blocks[1])` into the rings, waiting for free buffers.

    Pages outside the visible keys `[keys[0], keys[1])` are never touched: a copy that would need
    one takes the nearest visible page instead, and the mask hides what it brings.
    """
    first_page = jax.lax.div(keys[0], walk.page_size)
    last_page = jax.lax.div(keys[1] - 1, walk.page_size)

    def pieces(block: Any) -> list[tuple[Any, Any, Any]]:
        """`(page, slots, rows)`: which slots of which page are which rows of the block."""
        if walk.page_size >= walk.block:
            index = block * walk.block
            start = pl.multiple_of(jax.lax.rem(index, walk.page_size), walk.block)
            page = page_id(jax.lax.div(index, walk.page_size))
            return [(page, pl.ds(start, walk.block), pl.ds(0, walk.block))]
        return [
            (
                page_id(jnp.clip(block * walk.copies + i, first_page, last_page)),
                pl.ds(0, walk.page_size),
                pl.ds(i * walk.page_size, walk.page_size),
            )
            for i in range(walk.copies)
        ]

    def fetch(x: Stream, block: Any, to: Any, landed: Any, scales: Any = None) -> None:
        for page, slots, rows in pieces(block):
            plgpu.copy_gmem_to_smem(x.pool.at[page, head, slots], to.at[rows], landed)
            if scales is not None:
                scale = x.pool_scale.at[page, head, slots]
                plgpu.copy_gmem_to_smem(scale, scales.at[rows], landed)

    def fetch_ahead(x: Stream, turn: Any) -> None:
        slot = jax.lax.rem(turn, walk.ahead)
        fetch(x, blocks[0] + turn, x.stored.at[slot], x.landed.at[slot], x.scales.at[slot])

    turns = blocks[1] - blocks[0]
    if walk.scaled:

        @pl.loop(0, jnp.minimum(turns, walk.ahead))
        def _(turn):
            for x in streams:
                fetch_ahead(x, turn)

    @pl.loop(0, turns)
    def _(turn):
        stage = jax.lax.rem(turn, walk.stages)
        for x in streams:

            @pl.when(turn >= walk.stages)
            def _(x=x):
                plgpu.barrier_wait(x.free.at[stage])

            if not walk.scaled:
                fetch(x, blocks[0] + turn, x.blocks.at[stage], x.ready.at[stage])
                continue
            slot = jax.lax.rem(turn, walk.ahead)
            plgpu.barrier_wait(x.landed.at[slot])
            _multiply(walk, x, slot, stage)
            plgpu.commit_smem()  # also: all have read what the next copy overwrites
            plgpu.barrier_arrive(x.ready.at[stage])

            @pl.when(turn + walk.ahead < turns)
            def _(x=x):
                fetch_ahead(x, turn + walk.ahead)

    @pl.loop(jnp.maximum(0, turns - walk.stages), turns)
    def _(turn):  # what is still being read: every arrival at a barrier is waited for
        for x in streams:
            plgpu.barrier_wait(x.free.at[jax.lax.rem(turn, walk.stages)])


def _multiply(walk: Walk, x: Stream, slot: Any, stage: Any) -> None:
    """Stored numbers times their scale, as bfloat16: 64 rows and a swizzled tile at a time."""
    g, width = walk.group, x.blocks.shape[2]
    for first in range(0, walk.block, ROWS):
        rows = pl.ds(first, ROWS)
        for column in range(0, width, walk.columns(width)):
            part = (rows, pl.ds(column, walk.columns(width)))
            numbers = g.scaled(x.stored.at[(slot, *part)], x.scales.at[slot, rows])
            store(x.blocks.at[(stage, *part)], numbers.astype(walk.dtype))
