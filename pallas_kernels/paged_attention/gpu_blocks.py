"""What the decode and prefill kernels of Mosaic GPU share: the walk over blocks of keys.

A block is `block` consecutive keys of one sequence and one KV head, one TMA copy per page (or part
of a page). One warpgroup only copies; the others multiply. Two barriers per stage and per pool
pass a buffer back and forth: `ready` when its copies have landed, `free` when it has been read.

Scores live in powers of two: `m` is the running maximum of `score * log2(e)`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kvjax.pallas_kernels.compat import mosaic_gpu as plgpu
from kvjax.pallas_kernels.hopper import ROWS, Warpgroup, tiled
from kvjax.pallas_kernels.paged_attention.softmax import NEVER
from kvjax.pallas_kernels.tuning import rule

LOG2_E = math.log2(math.e)

# Columns of `bounds`, one row per tile: which sequence, and what its query rows see.
SEQ, KV_LEN, FIRST, LAST, DENSE_LO, DENSE_HI = range(6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """Static facts of one kernel. `consumers` warpgroups of 64 query rows share each block."""

    page_size: int
    width: int
    v_width: int
    block: int
    stages: int
    consumers: int
    scale: float
    soft_cap: float | None
    tail_words: int
    dtype: Any
    interpret: Any

    @property
    def group(self) -> Warpgroup:
        """The arithmetic of one warpgroup."""
        return Warpgroup(self.interpret)

    @property
    def copies(self) -> int:
        """Copies that fill one block of keys (or of values)."""
        return max(1, self.block // self.page_size)

    def scratch(self) -> dict[str, Any]:
        """Shared memory and barriers."""
        rows = (self.consumers, ROWS)
        words = max(1, self.tail_words)
        return {
            "q_smem": tiled((*rows, self.width), self.dtype),
            "k_smem": tiled((self.stages, self.block, self.width), self.dtype),
            "v_smem": tiled((self.stages, self.block, self.v_width), self.dtype),
            "lo_smem": plgpu.SMEM(rows, jnp.int32),
            "hi_smem": plgpu.SMEM(rows, jnp.int32),
            "tail_smem": plgpu.SMEM((self.consumers, words, ROWS), jnp.int32),
            "o_smem": plgpu.SMEM((*rows, self._o_columns), jnp.float32),
            "lse_smem": plgpu.SMEM(rows, jnp.float32),
            "rows_ready": plgpu.Barrier(num_arrivals=self.consumers * (3 + self.tail_words)),
            "k_ready": plgpu.Barrier(num_arrivals=self.copies, num_barriers=self.stages),
            "v_ready": plgpu.Barrier(num_arrivals=self.copies, num_barriers=self.stages),
            "k_free": plgpu.Barrier(num_arrivals=self.consumers, num_barriers=self.stages),
            "v_free": plgpu.Barrier(num_arrivals=self.consumers, num_barriers=self.stages),
            "v_clean": plgpu.Barrier(num_arrivals=self.consumers),
        }

    @property
    def _o_columns(self) -> int:
        return math.gcd(self.v_width, 64 if self.v_width <= 128 else 32)


def load_rows(walk: Walk, s: Any, q: Any, lo: Any, hi: Any, tail: Any) -> None:
    """Starts the copies of a tile's query rows; each ref begins with the consumers."""
    for w in range(walk.consumers):
        plgpu.copy_gmem_to_smem(q.at[w], s.q_smem.at[w], s.rows_ready)
        plgpu.copy_gmem_to_smem(lo.at[w], s.lo_smem.at[w], s.rows_ready)
        plgpu.copy_gmem_to_smem(hi.at[w], s.hi_smem.at[w], s.rows_ready)
        for word in range(walk.tail_words):
            plgpu.copy_gmem_to_smem(tail.at[w, word], s.tail_smem.at[w, word], s.rows_ready)


def load_blocks(
    walk: Walk, s: Any, pools: tuple[Any, Any], page_id: Any, head: Any, blocks: Any, keys: Any
) -> None:
    """Copies blocks `[blocks[0], blocks[1])` into the ring of stages, waiting for free buffers.

    Pages outside the visible keys `[keys[0], keys[1])` are never touched: a copy that would need
    one takes the nearest visible page instead, and the mask hides what it brings.
    """
    first_page = jax.lax.div(keys[0], walk.page_size)
    last_page = jax.lax.div(keys[1] - 1, walk.page_size)

    def copy(pool: Any, smem: Any, ready: Any, block: Any, stage: Any) -> None:
        if walk.page_size >= walk.block:
            index = block * walk.block
            page = page_id(jax.lax.div(index, walk.page_size))
            offset = pl.multiple_of(jax.lax.rem(index, walk.page_size), walk.block)
            source = pool.at[page, head, pl.ds(offset, walk.block)]
            plgpu.copy_gmem_to_smem(source, smem.at[stage], ready.at[stage])
            return
        for i in range(walk.copies):
            page = page_id(jnp.clip(block * walk.copies + i, first_page, last_page))
            part = smem.at[stage, pl.ds(i * walk.page_size, walk.page_size)]
            plgpu.copy_gmem_to_smem(pool.at[page, head], part, ready.at[stage])

    @pl.loop(blocks[0], blocks[1])
    def _(block):
        turn = block - blocks[0]
        stage = jax.lax.rem(turn, walk.stages)
        for pool, smem, ready, free in (
            (pools[0], s.k_smem, s.k_ready, s.k_free),
            (pools[1], s.v_smem, s.v_ready, s.v_free),
        ):

            @pl.when(turn >= walk.stages)
            def _(free=free):
                plgpu.barrier_wait(free.at[stage])

            copy(pool, smem, ready, block, stage)

    @pl.loop(jnp.maximum(blocks[0], blocks[1] - walk.stages), blocks[1])
    def _(block):  # what is still being read: every arrival at a barrier is waited for
        stage = jax.lax.rem(block - blocks[0], walk.stages)
        plgpu.barrier_wait(s.k_free.at[stage])
        plgpu.barrier_wait(s.v_free.at[stage])


def attend_blocks(walk: Walk, s: Any, w: Any, kv_len: Any, blocks: Any, dense: Any) -> Any:
    """The running softmax of consumer `w` over the blocks that `load_blocks` brings.

    Blocks within `[dense[0], dense[1])` are seen whole by every row of the tile and need no mask.
    Returns the weighted values, the maximum and the normaliser.
    """
    g = walk.group
    plgpu.barrier_wait(s.rows_ready)
    start = (
        g.full((ROWS, walk.v_width), 0.0),
        g.full((ROWS,), NEVER),
        g.full((ROWS,), 0.0),
    )

    def step(block: Any, state: Any, masked: bool) -> Any:
        acc, m, l = state
        stage = jax.lax.rem(block - blocks[0], walk.stages)
        plgpu.barrier_wait(s.k_ready.at[stage])
        scores = g.scores(s.q_smem.at[w], s.k_smem.at[stage])
        plgpu.barrier_arrive(s.k_free.at[stage])
        scores = _capped(scores, walk) * LOG2_E
        seen = _visible(walk, s, w, block * walk.block, kv_len) if masked else None
        if seen is not None:
            scores = jnp.where(seen, scores, NEVER)
        new = jnp.maximum(m, scores.max(axis=1))
        p = jnp.exp2(scores - jax.lax.broadcast_in_dim(new, scores.shape, [0]))
        if seen is not None:  # a row that has seen nothing yet has the maximum NEVER
            p = jnp.where(seen, p, 0.0)
        fade = jnp.exp2(m - new)
        l = l * fade + p.sum(axis=1)
        acc = acc * jax.lax.broadcast_in_dim(fade, acc.shape, [0])
        plgpu.barrier_wait(s.v_ready.at[stage])
        if masked:
            _clean_values(walk, s, w, block * walk.block, kv_len, stage)
        acc = g.accumulate(acc, p.astype(walk.dtype), s.v_smem.at[stage])
        plgpu.barrier_arrive(s.v_free.at[stage])
        return acc, new, l

    def masked(block: Any, state: Any) -> Any:
        return step(block, state, True)

    def unmasked(block: Any, state: Any) -> Any:
        return step(block, state, False)

    low = jnp.clip(dense[0], blocks[0], blocks[1])
    high = jnp.clip(dense[1], low, blocks[1])
    state = jax.lax.fori_loop(blocks[0], low, masked, start)
    state = jax.lax.fori_loop(low, high, unmasked, state)
    return jax.lax.fori_loop(high, blocks[1], masked, state)


def _capped(scores: jax.Array, walk: Walk) -> jax.Array:
    scores = scores * walk.scale
    if walk.soft_cap is None:
        return scores
    # tanh.approx is off by 5e-4, times the cap; this form by one rounding of 1.
    e = jnp.exp2(scores * (2 * LOG2_E / walk.soft_cap))
    return walk.soft_cap - (2 * walk.soft_cap) / (e + 1.0)


def _visible(walk: Walk, s: Any, w: Any, first: Any, kv_len: Any) -> jax.Array:
    """Which of the keys `first, first + 1, ...` each row of consumer `w` sees."""
    g, shape = walk.group, (ROWS, walk.block)

    def spread(row: jax.Array) -> jax.Array:
        return jax.lax.broadcast_in_dim(row, shape, [0])

    keys = g.iota(shape, 1) + first
    words = [spread(g.by_row(s.tail_smem.at[w, i])) for i in range(walk.tail_words)]
    lo, hi = g.by_row(s.lo_smem.at[w]), g.by_row(s.hi_smem.at[w])
    return _seen(keys, spread(lo), spread(hi), words, kv_len)


def _seen(keys: Any, lo: Any, hi: Any, words: Any, kv_len: Any) -> jax.Array:
    seen = (keys >= lo) & (keys < hi)
    if not words:
        return seen
    bit = keys - (kv_len - 32 * len(words))
    allowed = bit < 0
    for i, word in enumerate(words):
        mine = (bit >= 32 * i) & (bit < 32 * (i + 1))
        allowed = allowed | (mine & (((word >> (bit & 31)) & 1) == 1))
    return seen & allowed


def _clean_values(walk: Walk, s: Any, w: Any, first: Any, kv_len: Any, stage: Any) -> None:
    """Zeroes the values that no row of the tile sees: zero times what they hold may be NaN.

    The consumers share the block: each cleans every `consumers`-th 64 keys, then all wait.
    """
    g, shape = walk.group, (ROWS, ROWS)
    for part in range(-(-walk.block // ROWS)):
        rows = min(ROWS, walk.block)

        def clean(part: int = part, rows: int = rows) -> None:
            keys = g.iota(shape, 0) + (first + part * ROWS)
            alive = g.full((ROWS,), 0.0)
            for other in range(walk.consumers):

                def spread(ref: Any) -> jax.Array:
                    return jax.lax.broadcast_in_dim(g.by_column(ref), shape, [1])

                words = [spread(s.tail_smem.at[other, i]) for i in range(walk.tail_words)]
                lo, hi = spread(s.lo_smem.at[other]), spread(s.hi_smem.at[other])
                seen = _seen(keys, lo, hi, words, kv_len)
                one = jnp.where(seen, g.full(shape, 1.0), 0.0)
                alive = jnp.maximum(alive, one.max(axis=1))
            ref = s.v_smem.at[stage, pl.ds(part * ROWS, rows)]
            values = g.matrix(ref)
            kept = jax.lax.broadcast_in_dim(alive, values.shape, [0]) > 0.5
            ref[...] = jnp.where(kept, values, jnp.zeros_like(values))

        if walk.consumers == 1:
            clean()
        else:
            pl.when(w == part % walk.consumers)(clean)
    plgpu.commit_smem()
    if walk.consumers > 1:
        plgpu.barrier_arrive(s.v_clean)
        plgpu.barrier_wait(s.v_clean)


def store(walk: Walk, s: Any, w: Any, state: Any, o: Any, lse: Any, rows: int) -> None:
    """Writes the first `rows` rows of normalised output to `o`, and every lse to `lse`."""
    acc, m, l = state
    empty = l == 0.0
    inverse = 1.0 / jnp.where(empty, 1.0, l)
    log_sum = (m + jnp.log2(jnp.where(empty, 1.0, l))) * (1.0 / LOG2_E)
    s.lse_smem.at[w][...] = jnp.where(empty, -jnp.inf, log_sum)
    acc = acc * jax.lax.broadcast_in_dim(inverse, acc.shape, [0])
    columns = walk._o_columns
    for first in range(0, walk.v_width, columns):
        s.o_smem.at[w][...] = acc[:, first : first + columns]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            s.o_smem.at[w, pl.ds(0, rows)], o.at[pl.ds(0, rows), pl.ds(first, columns)]
        )
        plgpu.wait_smem_to_gmem(0)
    plgpu.copy_smem_to_gmem(s.lse_smem.at[w], lse)
    plgpu.wait_smem_to_gmem(0)


def run_tile(
    walk: Walk, s: Any, *, rows: Any, pools: Any, page_id: Any, head: Any, kv_len: Any, keys: Any,
    dense: Any, o: Any, lse: Any, num_rows: int,
) -> None:  # fmt: skip
    """One thread block: the rows of one tile against the visible keys `[keys[0], keys[1])`.

    A tile without keys writes an lse of -inf and leaves its output unwritten.
    """
    w = jax.lax.axis_index("warpgroup")
    blocks = (jax.lax.div(keys[0], walk.block), jax.lax.div(keys[1] + walk.block - 1, walk.block))
    dense_blocks = (
        jax.lax.div(dense[0] + walk.block - 1, walk.block),
        jax.lax.div(dense[1], walk.block),
    )
    some = keys[0] < keys[1]

    @pl.when(some & (w == walk.consumers))
    def _load():
        walk.group.registers(40, "decrease")
        load_rows(walk, s, *rows)
        load_blocks(walk, s, pools, page_id, head, blocks, keys)

    @pl.when(some & (w < walk.consumers))
    def _attend():
        walk.group.registers(232, "increase")
        state = attend_blocks(walk, s, w, kv_len, blocks, dense_blocks)
        store(walk, s, w, state, o.at[w], lse.at[w], num_rows)

    @pl.when(jnp.logical_not(some) & (w < walk.consumers))
    def _nothing():
        s.lse_smem.at[w][...] = walk.group.full((ROWS,), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(s.lse_smem.at[w], lse.at[w])
        plgpu.wait_smem_to_gmem(0)


# 227 KiB of shared memory. Decode leaves room for a second thread block on the same processor,
# whose copies run while this one computes, wherever the width allows.
@rule("paged_attention/gpu_decode")
def _decode_sizes(*, head_dim: int, page_size: int) -> dict[str, int]:
    del head_dim, page_size
    return {"block": 64, "stages": 2, "split": 1024}


@rule("paged_attention/gpu_prefill")
def _prefill_sizes(*, head_dim: int, page_size: int) -> dict[str, int]:
    del page_size
    return {"block": 64 if head_dim > 128 else 128, "stages": 2, "split": 1024}
