"""Repositioning in float64 numpy, token by token: the specification of every backend."""

import numpy as np

from kvjax.pallas_kernels.page_ops import reference as page_ops
from kvjax.pallas_kernels.page_ops.pages import KVSpan, LayerPages, Pages
from kvjax.pallas_kernels.reposition.patches import LowRank


def reposition(
    pages: Pages, src_slots, dst_slots, cos, sin, *, patch_k, patch_v, frame, rotary_offset
) -> LayerPages:
    """See `kvjax.pallas_kernels.reposition`; `dst_slots=None` is in place. Returns new arrays.

    What is rounded is the float64 result; a backend may be one rounding of float32 away.
    """
    src = np.asarray(src_slots)
    in_place = dst_slots is None
    dst = src if in_place else np.asarray(dst_slots)
    span = page_ops.export_span(pages, src)
    k = page_ops.decode(span.k, span.k_scale)
    patch = 0.0 if patch_k is None else _dense(patch_k)
    if frame == "source":
        k = rotate(k + patch, cos, sin, rotary_offset)
    else:
        k = rotate(k, cos, sin, rotary_offset) + patch
    k, k_scale = page_ops.encode(k, span.k.dtype)
    v, v_scale = span.v, span.v_scale
    if v is not None and patch_v is not None:
        v, v_scale = page_ops.encode(page_ops.decode(v, v_scale) + _dense(patch_v), v.dtype)
    moved = KVSpan(k, v, k_scale, v_scale)  # type: ignore[arg-type]
    return page_ops.import_span(pages, moved, dst)


def rotate(k: np.ndarray, cos, sin, offset: int) -> np.ndarray:
    """Keys `[tokens, kv_heads, width]` with the channel pairs from `offset` on turned."""
    cos, sin = (np.asarray(x).astype(np.float64)[:, None] for x in (cos, sin))
    half, out = cos.shape[2], k.copy()
    first, second = k[..., offset : offset + half], k[..., offset + half : offset + 2 * half]
    out[..., offset : offset + half] = first * cos - second * sin
    out[..., offset + half : offset + 2 * half] = second * cos + first * sin
    return out


def _dense(patch) -> np.ndarray:
    if not isinstance(patch, LowRank):
        return np.asarray(patch).astype(np.float64)
    left, right = (np.asarray(x).astype(np.float64) for x in patch)
    return np.einsum("tr,rhw->thw", left, right)
