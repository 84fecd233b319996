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
from kvjax.pallas_kernels.page_ops import tpu_rows, xla
from kvjax.pallas_kernels.page_ops.pages import KVSpan, PackedPages, Pages
from kvjax.pallas_kernels.page_ops.quantise import decode, encode
from kvjax.pallas_kernels.reposition.patches import dense
from kvjax.pallas_kernels.reposition.xla import moved_keys


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
    dst = src if dst_slots is None else jnp.asarray(dst_slots)
    rows = page_ops.load_rows(packed, jnp.where(dst < 0, -1, src), interpret=interpret)
    rows = _moved(rows, packed, cos, sin, patch_k, patch_v, frame, rotary_offset)
    return page_ops.store_rows(packed, rows, dst, interpret=interpret)


def _moved(
    rows: PackedPages, pages: PackedPages, cos, sin, patch_k, patch_v, frame, offset: int
) -> PackedPages:
    """Rows with keys patched and rotated, and values patched."""
    patch = None if patch_k is None else dense(patch_k)
    width = max(offset + 2 * cos.shape[1], 0 if patch is None else patch.shape[2])
    if pages.scale is not None:
        half = _half_of_scaled(pages, width, patch_v is None)
        latent = half > width_of(pages)
        span = xla.unpack_span(rows, pages.kv_heads, (half, None if latent else half))
        k = moved_keys(decode(span.k, span.k_scale), cos, sin, _padded(patch, half), frame, offset)
        k, k_scale = encode(k, pages.kv.dtype)
        v, v_scale = span.v, span.v_scale
        if v is not None and patch_v is not None:
            v = decode(v, v_scale) + _wide(dense(patch_v), half)
            v, v_scale = encode(v, pages.kv.dtype)
        return xla.pack_span(KVSpan(k, v, k_scale, v_scale), pages)
    k = moved_keys(decode(rows.kv[..., :width]), cos, sin, _padded(patch, width), frame, offset)
    kv = rows.kv.at[..., :width].set(encode(k, rows.kv.dtype)[0])
    if patch_v is not None:
        half = width_of(pages)
        at = slice(half, half + patch_v.shape[2])
        v = decode(kv[..., at]).astype(jnp.float32) + dense(patch_v)
        kv = kv.at[..., at].set(encode(v, kv.dtype)[0])
    return PackedPages(kv)


def width_of(pages: PackedPages) -> int:
    """Lanes of a key that shares its row with a value."""
    return pages.kv.shape[3] // 2


def _half_of_scaled(pages: PackedPages, width: int, may_be_latent: bool) -> int:
    """Lanes that share the scale of the keys: half of them, all of a latent row."""
    if width > width_of(pages):
        return pages.kv.shape[3]
    if pages.kv_heads == 1 and may_be_latent:
        raise NotImplementedError(
            f"tpu: {width} channels of one scaled head may be a key beside its value or latent"
        )
    return width_of(pages)


def _padded(patch: Array | None, width: int) -> Array | None:
    return None if patch is None else _wide(patch, width)


def _wide(patch: Array, width: int) -> Array:
    return jnp.pad(patch, ((0, 0), (0, 0), (0, width - patch.shape[2])))


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
