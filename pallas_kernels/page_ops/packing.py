"""From one layout to the other, whole pools: for tests and for moving a cache between platforms."""

import jax.numpy as jnp
from jaxtyping import Array

from kvjax.pallas_kernels.page_ops.pages import LayerPages, PackedPages

_LANES = 128


def _whole(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def packed_width(k_width: int, v_width: int | None) -> int:
    """Lanes per slot, whole registers of 128: two equal halves, or one latent key."""
    return _whole(k_width if v_width is None else 2 * max(k_width, v_width), _LANES)


def packed_scale_shape(kv_heads: int, page_size: int, *, latent: bool) -> tuple[int, int]:
    """Rows and lanes of one page's scales."""
    return _whole(kv_heads if latent else 2 * kv_heads, 8), _whole(page_size, _LANES)


def pack_rows(k: Array, v: Array | None, lanes: int) -> Array:
    """`[..., lanes]` of keys and values `[..., width]`; padding is zero."""
    parts = [k] if v is None else [k, v]
    return jnp.concatenate([_pad(part, -1, lanes // len(parts)) for part in parts], axis=-1)


def pack_scales(k_scale: Array, v_scale: Array | None, rows: int) -> Array:
    """`[n, rows, ...]` of scales `[n, kv_heads, ...]`; padding is zero."""
    parts = [k_scale] if v_scale is None else [k_scale, v_scale]
    return _pad(jnp.concatenate(parts, axis=1), 1, rows)


def split_scales(scale: Array | None, heads: int, latent: bool) -> tuple[Array | None, ...]:
    """Key and value scales `[n, kv_heads, ...]` of `[n, rows, ...]`."""
    if scale is None:
        return None, None
    return scale[:, :heads], None if latent else scale[:, heads : 2 * heads]


def pack_pages(pages: LayerPages) -> PackedPages:
    """The same KV in the packed layout; padding is zero. A copy of the pool."""
    latent, scale = pages.v is None, None
    v_width = None if pages.v is None else pages.v.shape[3]
    if pages.k_scale is not None:
        rows, slots = packed_scale_shape(pages.kv_heads, pages.page_size, latent=latent)
        scale = _pad(pack_scales(pages.k_scale, pages.v_scale, rows), 2, slots)
    lanes = packed_width(pages.k.shape[3], v_width)
    return PackedPages(pack_rows(pages.k, pages.v, lanes), scale)


def split_pages(pages: PackedPages, k_width: int, v_width: int | None) -> LayerPages:
    """The same KV in the split layout; `v_width=None` for latent pages. A copy of the pool."""
    half = pages.kv.shape[3] // 2
    v = None if v_width is None else pages.kv[..., half : half + v_width]
    scale = None if pages.scale is None else pages.scale[..., : pages.page_size]
    k_scale, v_scale = split_scales(scale, pages.kv_heads, v_width is None)
    return LayerPages(pages.kv[..., :k_width], v, k_scale, v_scale)


def _pad(x: Array, axis: int, size: int) -> Array:
    axis %= x.ndim
    return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])
