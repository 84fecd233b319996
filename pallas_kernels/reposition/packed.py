"""Packed rows on the way to other positions: patched, rotated and rounded by XLA, anywhere."""

import jax.numpy as jnp
from jaxtyping import Array

from kvjax.pallas_kernels.page_ops.pages import KVSpan, PackedPages
from kvjax.pallas_kernels.page_ops.quantise import decode, encode
from kvjax.pallas_kernels.page_ops.xla import pack_span, unpack_span
from kvjax.pallas_kernels.reposition.patches import dense
from kvjax.pallas_kernels.reposition.rotation import moved_keys


def moved_rows(
    rows: PackedPages, pages: PackedPages, cos, sin, patch_k, patch_v, frame: str, offset: int
) -> PackedPages:
    """Rows of `pages` with keys patched and rotated, and values patched."""
    patch = None if patch_k is None else dense(patch_k)
    width = max(offset + 2 * cos.shape[1], 0 if patch is None else patch.shape[2])
    if pages.scale is not None:
        return _moved_scaled(rows, pages, cos, sin, patch, patch_v, frame, offset, width)
    k = moved_keys(decode(rows.kv[..., :width]), cos, sin, _padded(patch, width), frame, offset)
    kv = _with_lanes(rows.kv, 0, encode(k, rows.kv.dtype)[0])
    if patch_v is not None:
        half = pages.kv.shape[3] // 2
        at = slice(half, half + patch_v.shape[2])
        v = decode(rows.kv[..., at]).astype(jnp.float32) + dense(patch_v)
        kv = _with_lanes(kv, half, encode(v, rows.kv.dtype)[0])
    return PackedPages(kv)


def _with_lanes(rows: Array, first: int, x: Array) -> Array:
    """Rows with `x` in the lanes from `first` on.

    Not set into `rows`: XLA:CPU (jax 0.10) would update that array in place while the rotation
    still reads the other channel of the pair from it.
    """
    lanes, end = rows.shape[-1], first + x.shape[-1]
    lane = jnp.arange(lanes)
    x = jnp.pad(x, ((0, 0), (0, 0), (first, lanes - end)))
    return jnp.where((lane >= first) & (lane < end), x, rows)


def _moved_scaled(
    rows: PackedPages, pages: PackedPages, cos, sin, patch, patch_v, frame: str, offset: int,
    width: int,
) -> PackedPages:  # fmt: skip
    """The same of int8 and float8 rows, whose keys get a new scale; values only with a patch."""
    half = lanes_of_a_scale(pages, width, patch_v is None)
    latent = half > pages.kv.shape[3] // 2
    span = unpack_span(rows, pages.kv_heads, (half, None if latent else half))
    k, k_scale = turned_keys(span.k, span.k_scale, cos, sin, patch, frame, offset)
    v, v_scale = span.v, span.v_scale
    if v is not None and patch_v is not None:
        v = decode(v, v_scale) + _wide(dense(patch_v), half)
        v, v_scale = encode(v, pages.kv.dtype)
    return pack_span(KVSpan(k, v, k_scale, v_scale), pages)


def turned_keys(
    k: Array, k_scale: Array | None, cos, sin, patch: Array | None, frame: str, offset: int
) -> tuple[Array, Array | None]:
    """Scaled keys, patched and turned, with their new scales."""
    turned = moved_keys(
        decode(k, k_scale), cos, sin, _padded(patch, k.shape[2]), frame, offset
    )  # fmt: skip
    return encode(turned, k.dtype)


def shifted_keys(
    rows: PackedPages, pages: PackedPages, cos, sin, offset: int
) -> tuple[PackedPages, int]:
    """Scaled rows with turned keys, and the lanes of these; other lanes and scales are zero."""
    half = lanes_of_a_scale(pages, offset + 2 * cos.shape[1], True)
    span = unpack_span(rows, pages.kv_heads, (half, None))
    k, k_scale = turned_keys(span.k, span.k_scale, cos, sin, None, "source", offset)
    return pack_span(KVSpan(k, None, k_scale, None), pages), half


def lanes_of_a_scale(pages: PackedPages, width: int, may_be_latent: bool) -> int:
    """Lanes that share the scale of the keys: half of them, all of a latent row."""
    half = pages.kv.shape[3] // 2
    if width > half:
        return pages.kv.shape[3]
    if pages.kv_heads == 1 and may_be_latent:
        raise NotImplementedError(
            f"packed: {width} channels of one scaled head may be a key beside its value or latent"
        )
    return half


def _padded(patch: Array | None, width: int) -> Array | None:
    return None if patch is None else _wide(patch, width)


def _wide(patch: Array, width: int) -> Array:
    return jnp.pad(patch, ((0, 0), (0, 0), (0, width - patch.shape[2])))
