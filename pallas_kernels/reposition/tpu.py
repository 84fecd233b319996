"""Repositioning on Mosaic TPU: one pass in place for a shift, a gather and a merge for a move.

A shift reads each tile of the pool once, turns the keys of its rows in VMEM and writes it back. A
move must have read all its sources before it writes (the runs may overlap), so it gathers rows,
which XLA patches, rotates and rounds, and merges them into their new tiles.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kvjax.pallas_kernels.page_ops import tpu as page_ops
from kvjax.pallas_kernels.page_ops import tpu_rows
from kvjax.pallas_kernels.page_ops.packing import split_scales
from kvjax.pallas_kernels.page_ops.pages import KVSpan, PackedPages, Pages
from kvjax.pallas_kernels.page_ops.xla import pack_span
from kvjax.pallas_kernels.reposition.packed import (
    lanes_of_a_scale,
    moved_rows,
    shifted_keys,
    turned_keys,
)
from kvjax.pallas_kernels.reposition.patches import dense


def reposition(
    pages: Pages, src_slots, dst_slots, cos, sin, *, patch_k, patch_v, frame, rotary_offset,
    interpret: Any = False,
) -> Pages:  # fmt: skip
    """See `kvjax.pallas_kernels.reposition`; `dst_slots=None` shifts keys in place."""
    packed = page_ops.supported(pages, interpret)
    src, cos, sin = jnp.asarray(src_slots), jnp.asarray(cos), jnp.asarray(sin)
    stays = dst_slots is None and patch_k is None and patch_v is None
    if stays and packed.scale is None:
        pool = packed.kv
        for slots, c, s in zip(*map(tpu_rows.parts, (src, cos, sin)), strict=True):
            pool = _shift(pool, slots, c, s, rotary_offset, interpret)
        return PackedPages(pool)
    if stays:
        rows = page_ops.load_rows(packed, src, interpret=interpret)
        rows, lanes = shifted_keys(rows, packed, cos, sin, rotary_offset)
        return page_ops.store_rows(packed, rows, src, key_lanes=lanes, interpret=interpret)
    dst = src if dst_slots is None else jnp.asarray(dst_slots)
    src = jnp.where(dst < 0, -1, src)
    patch = None if patch_k is None else dense(patch_k)
    width = max(rotary_offset + 2 * cos.shape[1], 0 if patch is None else patch.shape[2])
    if packed.scale is not None and patch_v is None and _in_halves(packed, width):
        rows = _move_keys(packed, src, cos, sin, patch, frame, rotary_offset, interpret)
        return page_ops.store_rows(packed, rows, dst, interpret=interpret)
    rows = page_ops.load_rows(packed, src, interpret=interpret)
    rows = moved_rows(rows, packed, cos, sin, patch_k, patch_v, frame, rotary_offset)
    return page_ops.store_rows(packed, rows, dst, interpret=interpret)


def _in_halves(pages: PackedPages, width: int) -> bool:
    """Whether keys and values of scaled pages are whole registers of lanes each."""
    half = pages.kv.shape[3] // 2
    return half % 128 == 0 and lanes_of_a_scale(pages, width, True) == half


def _move_keys(
    pages: PackedPages, src: Array, cos: Array, sin: Array, patch: Array | None, frame: str,
    offset: int, interpret: Any,
) -> PackedPages:  # fmt: skip
    """Rows of scaled pages whose keys are turned and whose values are as they were.

    Values are read when the keys are done: XLA writes what waits for long from VMEM to HBM.
    """
    rows = page_ops.load_rows(pages, src, half=0, interpret=interpret)
    k_scale, v_scale = split_scales(rows.scale, pages.kv_heads, False)
    k, k_scale = turned_keys(rows.kv, k_scale, cos, sin, patch, frame, offset)
    k, src = jax.lax.optimization_barrier((k, src))
    v = page_ops.load_rows(PackedPages(pages.kv), src, half=1, interpret=interpret).kv
    return pack_span(KVSpan(k, v, k_scale, v_scale), pages)


def _shift(pool: Array, slots: Array, cos: Array, sin: Array, offset: int, interpret: Any) -> Array:
    """The pool with the keys at `slots` turned by the angles of their tokens."""
    half, lanes = cos.shape[1], pool.shape[3]
    tables = jnp.zeros((cos.shape[0], 1, 2 * lanes), jnp.float32)
    tables = tables.at[:, 0, offset : offset + half].set(cos)
    tables = tables.at[:, 0, offset + half : offset + 2 * half].set(cos)
    tables = tables.at[:, 0, lanes + offset : lanes + offset + half].set(-sin)
    tables = tables.at[:, 0, lanes + offset + half : lanes + offset + 2 * half].set(sin)

    def turn(old: Array, table: Array) -> Array:
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, 1, lanes), 2)
        partner = jnp.where(
            lane < offset + half,
            pltpu.roll(old, lanes - half, axis=2),
            pltpu.roll(old, half, axis=2),
        )
        turned = old * table[..., :lanes] + partner * table[..., lanes:]
        return jnp.where((lane >= offset) & (lane < offset + 2 * half), turned, old)

    rows = tpu_rows.tile_rows(pool.dtype)
    todo = tpu_rows.runs(jnp.arange(slots.shape[0], dtype=jnp.int32), slots, rows)
    return tpu_rows.merge_rows(
        tpu_rows.as_tiles(tables, pool.dtype), pool, todo, combine=turn, interpret=interpret,
        name="rotary_shift",
    )  # fmt: skip
