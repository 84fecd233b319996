"""From one layout to the other, whole pools: for tests and for moving a cache between platforms."""

from typing import Any

import jax.numpy as jnp

from kvjax.pallas_kernels.page_ops.pages import LayerPages, PackedPages

_LANES = 128


def packed_width(k_width: int, v_width: int | None) -> int:
    """Lanes per slot: two equal halves that fill whole registers, or one latent key.

    Two heads of 64 share the 128 lanes of a register; other widths are padded to 128.
    """
    if v_width is None:
        return -(-k_width // _LANES) * _LANES
    width = max(k_width, v_width)
    return 2 * (width if width == 64 else -(-width // _LANES) * _LANES)


def pack_pages(pages: LayerPages) -> PackedPages:
    """The same KV in the packed layout; padding lanes are zero. A copy of the pool."""
    v_width = None if pages.v is None else pages.v.shape[3]
    lanes = packed_width(pages.k.shape[3], v_width)
    parts = [pages.k] if pages.v is None else [pages.k, pages.v]
    parts = [_pad(part, lanes // len(parts)) for part in parts]
    scale = None
    if pages.k_scale is not None:
        v_scale: Any = jnp.ones_like(pages.k_scale) if pages.v_scale is None else pages.v_scale
        scale = jnp.stack([pages.k_scale, v_scale], axis=-1)
    return PackedPages(jnp.concatenate(parts, axis=-1), scale)


def split_pages(pages: PackedPages, k_width: int, v_width: int | None) -> LayerPages:
    """The same KV in the split layout; `v_width=None` for latent pages. A copy of the pool."""
    half, scale = pages.kv.shape[3] // 2, pages.scale
    k_scale = None if scale is None else scale[..., 0]
    if v_width is None:
        return LayerPages(pages.kv[..., :k_width], None, k_scale, None)
    v = pages.kv[..., half : half + v_width]
    return LayerPages(pages.kv[..., :k_width], v, k_scale, None if scale is None else scale[..., 1])


def _pad(x, width: int):
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, width - x.shape[-1]),))
