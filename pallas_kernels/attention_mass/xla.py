"""Attention mass as XLA loops over tiles of queries and blocks of keys: any platform."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.pallas_kernels.attention_mass.result import AttentionMass
from kvjax.pallas_kernels.page_ops.pages import Pages, decode_dtype
from kvjax.pallas_kernels.paged_attention.softmax import visible
from kvjax.pallas_kernels.paged_attention.xla import (
    BLOCK,
    TILE,
    load_keys,
    scores,
    supported,
    whole_blocks,
)


def attention_mass(
    q, lse, pages: Pages, block_tables, query_starts, kv_lens, visible_lo, visible_hi, *,
    scale, segment_starts, tail_mask, soft_cap, value_width,
) -> AttentionMass:  # fmt: skip
    """See `kvjax.pallas_kernels.attention_mass`."""
    del value_width  # values are not read
    q, lse, block_tables, starts, kv_lens, lo, hi = map(
        jnp.asarray, (q, lse, block_tables, query_starts, kv_lens, visible_lo, visible_hi)
    )
    held = jax.tree.map(jnp.asarray, supported(pages))
    tokens, tile = q.shape[0], min(TILE, q.shape[0])
    num_keys = block_tables.shape[1] * held.page_size
    tables = whole_blocks(held, block_tables)
    bounds = jnp.cumulative_sum(-(-jnp.diff(starts) // tile), include_initial=True)
    padded = jax.tree.map(
        lambda x: jnp.pad(x, ((0, tile),) + ((0, 0),) * (x.ndim - 1)),
        (_by_head(q, held, scale), lse, lo, hi, None if tail_mask is None else tail_mask),
    )

    def visit(j, mass: AttentionMass) -> AttentionMass:
        """Adds tile `j`, which holds query tokens of one sequence."""
        s = jnp.searchsorted(bounds, j, side="right").astype(jnp.int32) - 1
        first = starts[s] + (j - bounds[s]) * tile
        rows = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, tile), padded)
        ours = first + jnp.arange(tile, dtype=jnp.int32) < starts[s + 1]
        edges = None if segment_starts is None else jnp.asarray(segment_starts)[s]
        columns, segments = _tile(
            rows, ours, held, jax.lax.dynamic_slice_in_dim(tables, s, 1), kv_lens[s], edges,
            soft_cap,
        )  # fmt: skip
        columns = mass.columns.at[s].add(columns)
        if segments is None or mass.segments is None:
            return AttentionMass(columns, None)
        return AttentionMass(columns, _added(mass.segments, segments, first))

    mass = AttentionMass(
        jnp.zeros((tables.shape[0], tables.shape[1] * held.page_size), jnp.float32),
        None
        if segment_starts is None
        else jnp.zeros((tokens + tile, segment_starts.shape[1] - 1), jnp.float32),
    )
    mass = jax.lax.fori_loop(0, bounds[-1], visit, mass)
    segments = None if mass.segments is None else mass.segments[:tokens]
    return AttentionMass(mass.columns[:, :num_keys], segments)


def _by_head(q: Array, pages, scale: float) -> Array:
    """Scaled queries `[tokens, kv_heads, group, d]` in the dtype of the keys."""
    q = (q.astype(jnp.float32) * scale).astype(decode_dtype(pages))
    return q.reshape(q.shape[0], pages.kv_heads, -1, q.shape[2])


def _added(x: Array, rows: Array, first: Array) -> Array:
    held = jax.lax.dynamic_slice_in_dim(x, first, rows.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(x, held + rows, first, axis=0)


def _tile(rows, ours, pages, table, kv_len, edges, soft_cap) -> tuple[Array, Array | None]:
    """Column sums over the whole table and segment sums of one tile of one sequence."""
    q, lse, lo, hi, tail_mask = rows
    tile, kv_heads, group, d = q.shape
    counted = ours[:, None] & (lse > -jnp.inf)  # [tile, q_heads]
    lse = jnp.where(counted, lse, 0.0).reshape(tile, kv_heads, group)
    hi = jnp.where(ours, jnp.minimum(hi, kv_len), 0)
    lo = jnp.where(ours & (lo < hi), lo, hi)
    queries = q.transpose(1, 0, 2, 3).reshape(1, kv_heads, tile * group, d)

    def body(c, mass):
        keys = c * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
        k = load_keys(pages, table, c, d)
        score = scores(queries, k, soft_cap).reshape(kv_heads, tile, group, BLOCK)
        seen = visible(keys, lo, hi, kv_len, tail_mask)[:, None, None] & counted.reshape(
            tile, kv_heads, group, 1
        )
        p = jnp.exp(score.swapaxes(0, 1) - lse[..., None])
        p = jnp.sum(jnp.where(seen, p, 0.0), axis=(1, 2))  # [tile, BLOCK]
        columns = jax.lax.dynamic_update_slice_in_dim(mass[0], p.sum(axis=0), c * BLOCK, axis=0)
        if edges is None:
            return columns, None
        inside = (keys[:, None] >= edges[:-1]) & (keys[:, None] < edges[1:])
        part = jax.lax.dot(p, inside.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        return columns, mass[1] + part

    first = jnp.min(jnp.where(lo < hi, lo, jnp.iinfo(jnp.int32).max)) // BLOCK
    columns = jnp.zeros(table.shape[1] * pages.page_size, jnp.float32)
    segments = None if edges is None else jnp.zeros((tile, edges.shape[0] - 1), jnp.float32)
    return jax.lax.fori_loop(first, -(-jnp.max(hi) // BLOCK), body, (columns, segments))
