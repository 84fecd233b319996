"""What the decode and prefill kernels of Mosaic GPU share: the walk over blocks of keys.

A block is `block` consecutive keys of one sequence and one KV head. One warpgroup brings them
(`gpu_loads`), the others multiply. These take 64 query rows each; or, where an output of more than
256 channels does not fit a warpgroup's registers (latent attention), each takes the same rows and a
part of the channels, and all compute the scores.

Scores live in powers of two: `m` is the running maximum of `score * log2(e)`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kvjax.pallas_kernels.compat import mosaic_gpu as plgpu
from kvjax.pallas_kernels.hopper import ROWS
from kvjax.pallas_kernels.paged_attention.gpu_loads import load_blocks, load_rows, streams
from kvjax.pallas_kernels.paged_attention.gpu_walk import Walk
from kvjax.pallas_kernels.paged_attention.softmax import NEVER

LOG2_E = math.log2(math.e)


def attend_blocks(walk: Walk, s: Any, w: Any, kv_len: Any, blocks: Any, dense: Any) -> Any:
    """The running softmax of warpgroup `w` over the blocks that `load_blocks` brings.

    Blocks within `[dense[0], dense[1])` are seen whole by every row of the tile and need no mask.
    Returns the weighted values, the maximum and the normaliser.
    """
    g, (r, part) = walk.group, walk.mine(w)
    v_smem, v_ready, v_free = (
        (s.k_smem, s.k_ready, s.k_free) if walk.latent else (s.v_smem, s.v_ready, s.v_free)
    )
    plgpu.barrier_wait(s.rows_ready)
    start = (
        g.full((ROWS, walk.v_columns), 0.0),
        g.full((ROWS,), NEVER),
        g.full((ROWS,), 0.0),
    )

    def step(block: Any, state: Any, masked: bool) -> Any:
        acc, m, l = state
        stage = jax.lax.rem(block - blocks[0], walk.stages)
        values = v_smem.at[stage, :, walk.channels(part)]
        plgpu.barrier_wait(s.k_ready.at[stage])
        if masked and walk.latent:
            _clean_values(walk, s, w, block * walk.block, kv_len, values)
        scores = g.scores(s.q_smem.at[r], s.k_smem.at[stage])
        if not walk.latent:
            plgpu.barrier_arrive(s.k_free.at[stage])
        scores = capped(scores, walk) * LOG2_E
        seen = visible(walk, s, r, block * walk.block, kv_len) if masked else None
        if seen is not None:
            scores = jnp.where(seen, scores, NEVER)
        new = jnp.maximum(m, scores.max(axis=1))
        p = jnp.exp2(scores - jax.lax.broadcast_in_dim(new, scores.shape, [0]))
        if seen is not None:  # a row that has seen nothing yet has the maximum NEVER
            p = jnp.where(seen, p, 0.0)
        fade = jnp.exp2(m - new)
        l = l * fade + p.sum(axis=1)
        acc = acc * jax.lax.broadcast_in_dim(fade, acc.shape, [0])
        if not walk.latent:
            plgpu.barrier_wait(v_ready.at[stage])
            if masked:
                _clean_values(walk, s, w, block * walk.block, kv_len, values)
        acc = g.accumulate(acc, p.astype(walk.dtype), values)
        plgpu.barrier_arrive(v_free.at[stage])
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


def capped(scores: jax.Array, walk: Walk) -> jax.Array:
    """Products of queries and keys, scaled and softly capped."""
    scores = scores * walk.scale
    if walk.soft_cap is None:
        return scores
    # tanh.approx is off by 5e-4, times the cap; this form by one rounding of 1.
    e = jnp.exp2(scores * (2 * LOG2_E / walk.soft_cap))
    return walk.soft_cap - (2 * walk.soft_cap) / (e + 1.0)


def visible(walk: Walk, s: Any, w: Any, first: Any, kv_len: Any) -> jax.Array:
    """Which of the keys `first, first + 1, ...` each of the query rows `w` sees."""
    g, shape = walk.group, (ROWS, walk.block)

    def spread(row: jax.Array) -> jax.Array:
        return jax.lax.broadcast_in_dim(row, shape, [0])

    keys = g.iota(shape, 1) + first
    lo, hi, *words = (spread(g.by_row(s.seen_smem.at[w, i])) for i in range(2 + walk.tail_words))
    return _seen(keys, lo, hi, words, kv_len)


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


def _clean_values(walk: Walk, s: Any, w: Any, first: Any, kv_len: Any, block: Any) -> None:
    """Zeroes the values that no row of the tile sees: zero times what they hold may be NaN.

    The warpgroups share the block, of which `block` is what this one multiplies: each cleans every
    `consumers`-th 64 keys of its channels, then all wait.
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

                rows_seen = (s.seen_smem.at[other, i] for i in range(2 + walk.tail_words))
                lo, hi, *words = map(spread, rows_seen)
                seen = _seen(keys, lo, hi, words, kv_len)
                one = jnp.where(seen, g.full(shape, 1.0), 0.0)
                alive = jnp.maximum(alive, one.max(axis=1))
            ref = block.at[pl.ds(part * ROWS, rows)]
            values = g.matrix(ref)
            kept = jax.lax.broadcast_in_dim(alive, values.shape, [0]) > 0.5
            ref[...] = jnp.where(kept, values, jnp.zeros_like(values))

        if walk.consumers == 1:
            clean()
        else:
            pl.when(w == part % walk.consumers)(clean)
    plgpu.commit_smem()
    if walk.warpgroups > 1:
        plgpu.barrier_arrive(s.v_clean)
        plgpu.barrier_wait(s.v_clean)


def write(walk: Walk, s: Any, w: Any, state: Any, o: Any, lse: Any, rows: int) -> None:
    """Writes warpgroup `w`'s part of the first `rows` rows of output to `o`, and every lse."""
    (r, part), (acc, m, l) = walk.mine(w), state
    empty = l == 0.0
    inverse = 1.0 / jnp.where(empty, 1.0, l)
    log_sum = (m + jnp.log2(jnp.where(empty, 1.0, l))) * (1.0 / LOG2_E)
    s.lse_smem.at[w][...] = jnp.where(empty, -jnp.inf, log_sum)
    acc = acc * jax.lax.broadcast_in_dim(inverse, acc.shape, [0])
    columns = walk.o_columns
    for first in range(0, walk.v_columns, columns):
        s.o_smem.at[w][...] = acc[:, first : first + columns]
        plgpu.commit_smem()
        start = part * walk.v_columns + first
        start = start if walk.parts == 1 else pl.multiple_of(start, columns)
        piece = s.o_smem.at[w, pl.ds(0, rows)]
        plgpu.copy_smem_to_gmem(piece, o.at[r, pl.ds(0, rows), pl.ds(start, columns)])
        plgpu.wait_smem_to_gmem(0)
    _write_lse(walk, s, w, lse)


def _write_lse(walk: Walk, s: Any, w: Any, lse: Any) -> None:
    r, part = walk.mine(w)

    def copy() -> None:
        plgpu.copy_smem_to_gmem(s.lse_smem.at[w], lse.at[r])
        plgpu.wait_smem_to_gmem(0)

    if walk.parts == 1:
        copy()
    else:  # all parts have computed the same
        pl.when(part == 0)(copy)


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
    # Together they must not exceed what the thread block was launched with.
    few, many = 40, 232
    if walk.scaled:
        few, many = 88, 208 if walk.warpgroups > 1 else 184

    @pl.when(some & (w == walk.warpgroups))
    def _load():
        walk.group.registers(few, "decrease")
        load_rows(walk, s, *rows)
        load_blocks(
            walk, streams(walk, s, pools), page_id, jax.lax.div(head, walk.share), blocks, keys
        )

    @pl.when(some & (w < walk.warpgroups))
    def _attend():
        walk.group.registers(many, "increase")
        state = attend_blocks(walk, s, w, kv_len, blocks, dense_blocks)
        write(walk, s, w, state, o, lse, num_rows)

    @pl.when(jnp.logical_not(some) & (w < walk.warpgroups))
    def _nothing():
        s.lse_smem.at[w][...] = walk.group.full((ROWS,), -jnp.inf)
        plgpu.commit_smem()
        _write_lse(walk, s, w, lse)
