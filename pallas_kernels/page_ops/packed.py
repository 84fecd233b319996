"""The packed layout of a TPU: how K, V and their scales lie in the lanes of a page.

A slot of one head is one row of `lanes` channels, a multiple of 128: the key first, the value from
the middle on, each padded with zeros. A latent slot is a key alone. One page of all heads is then
contiguous in memory, and tiles whatever the number of heads.

Scales of int8 and float8 pages are float32 `[pages, rows, slots]`, slots along the lanes, where
they multiply scores: the key scales of the heads first, then the value scales; rows are padded to
8, slots to 128, as the memory of a TPU would do anyway.
"""

import jax.numpy as jnp
from jaxtyping import Array

LANES = 128


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def packed_lanes(width: int, *, latent: bool = False) -> int:
    """Lanes of one slot and head with keys (and values, unless latent) of `width` channels."""
    return _round_up(width if latent else 2 * width, LANES)


def scale_shape(kv_heads: int, page_size: int, *, latent: bool = False) -> tuple[int, int]:
    """Rows and lanes of one page's scales."""
    return _round_up(kv_heads if latent else 2 * kv_heads, 8), _round_up(page_size, LANES)


def pack_rows(k: Array, v: Array | None) -> Array:
    """`[..., lanes]` of keys and values `[..., width]`."""

    def pad(x: Array, lanes: int) -> Array:
        return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, lanes - x.shape[-1]),))

    if v is None:
        return pad(k, packed_lanes(k.shape[-1], latent=True))
    half = packed_lanes(max(k.shape[-1], v.shape[-1])) // 2
    return jnp.concatenate([pad(k, half), pad(v, half)], axis=-1)


def unpack_rows(rows: Array, width: int, *, latent: bool = False) -> tuple[Array, Array | None]:
    """Keys and values `[..., width]` of packed rows; None for the values of latent rows."""
    half = rows.shape[-1] // 2
    return rows[..., :width], None if latent else rows[..., half : half + width]
