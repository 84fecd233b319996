"""Repositioning as one gather and one scatter: any platform, either layout."""

import jax.numpy as jnp

from kvjax.pallas_kernels.page_ops.pages import LayerPages, PackedPages, Pages
from kvjax.pallas_kernels.page_ops.quantise import decode, encode
from kvjax.pallas_kernels.page_ops.xla import load_rows, store_rows
from kvjax.pallas_kernels.reposition.packed import moved_rows
from kvjax.pallas_kernels.reposition.patches import dense
from kvjax.pallas_kernels.reposition.rotation import moved_keys


def reposition(
    pages: Pages, src_slots, dst_slots, cos, sin, *, patch_k, patch_v, frame, rotary_offset
) -> Pages:
    """See `kvjax.pallas_kernels.reposition`; `dst_slots=None` shifts keys in place."""
    src = jnp.asarray(src_slots)
    if isinstance(pages, PackedPages):
        dst = src if dst_slots is None else jnp.asarray(dst_slots)
        rows = load_rows(pages, src)
        assert isinstance(rows, PackedPages)
        cos, sin = jnp.asarray(cos), jnp.asarray(sin)
        rows = moved_rows(rows, pages, cos, sin, patch_k, patch_v, frame, rotary_offset)
        return store_rows(pages, rows, dst)
    stays = dst_slots is None and patch_v is None
    held = LayerPages(pages.k, None, pages.k_scale, None) if stays else pages
    rows = load_rows(held, src)
    assert isinstance(rows, LayerPages)
    patch = None if patch_k is None else dense(patch_k)
    k = moved_keys(decode(rows.k, rows.k_scale), cos, sin, patch, frame, rotary_offset)
    k, k_scale = encode(k, rows.k.dtype)
    v, v_scale = rows.v, rows.v_scale
    if v is not None and patch_v is not None:
        v, v_scale = encode(decode(v, v_scale) + dense(patch_v), v.dtype)
    dst = src if dst_slots is None else jnp.asarray(dst_slots)
    stored = store_rows(held, LayerPages(k, v, k_scale, v_scale), dst)
    assert isinstance(stored, LayerPages)
    return LayerPages(stored.k, pages.v, stored.k_scale, pages.v_scale) if stays else stored
