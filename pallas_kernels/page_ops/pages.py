"""One layer's pages, in the two physical layouts, and a run of KV outside of them.

Physical dtypes: float32 and (where it can be scattered into) bfloat16 hold numbers; `uint16` holds
the bits of bfloat16 and `uint8` those of float8_e4m3fn, because XLA:CPU converts a whole pool of a
type that it does not compute in around a scatter (jax 0.10; float8 on 0.12 too). int8 and float8
pages carry a float32 scale per slot and head: a number is `stored * scale`.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

FLOAT8 = jnp.dtype(jnp.float8_e4m3fn)
_QUANTISED = (np.dtype(np.int8), np.dtype(np.uint8), FLOAT8)


class LayerPages(NamedTuple):
    """One layer's KV pages, split layout (CPU, GPU).

    `v` is None where values are the leading channels of the keys (latent attention).
    """

    k: Array  # [pages, kv_heads, page_size, k_width]
    v: Array | None = None  # [pages, kv_heads, page_size, v_width]
    k_scale: Array | None = None  # f32[pages, kv_heads, page_size], of int8 and float8 pages
    v_scale: Array | None = None  # the same of `v`

    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
        return self.k.shape[0]

    @property
    def kv_heads(self) -> int:
        """Heads per slot."""
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        """Slots per page."""
        return self.k.shape[2]

    @property
    def dtype(self) -> jnp.dtype:
        """What is stored, bits read as the numbers that they are."""
        return stored_dtype(self.k.dtype)

    @property
    def quantised(self) -> bool:
        """Whether numbers are `stored * scale`."""
        return self.k.dtype in _QUANTISED


class PackedPages(NamedTuple):
    """One layer's KV pages, packed layout (TPU): lanes K | V, or one latent head per slot.

    With `half = kv.shape[3] // 2`, keys start at lane 0 and values at lane `half`; lanes past a
    width are padding. Latent pages (`value_width` is given) use all lanes for the key.

    Scales have the slots along their lanes, where a kernel multiplies scores by them: row `h` is
    head `h` of the keys, row `kv_heads + h` that of the values, if any. Rows are padded to 8 and
    slots to 128, which the memory of a TPU does anyway.
    """

    kv: Array  # [pages, kv_heads, page_size, lanes]
    scale: Array | None = None  # f32[pages, rows, slots]

    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
        return self.kv.shape[0]

    @property
    def kv_heads(self) -> int:
        """Heads per slot."""
        return self.kv.shape[1]

    @property
    def page_size(self) -> int:
        """Slots per page."""
        return self.kv.shape[2]

    @property
    def dtype(self) -> jnp.dtype:
        """What is stored, bits read as the numbers that they are."""
        return stored_dtype(self.kv.dtype)

    @property
    def quantised(self) -> bool:
        """Whether numbers are `stored * scale`."""
        return self.kv.dtype in _QUANTISED


Pages = LayerPages | PackedPages


class KVSpan(NamedTuple):
    """KV of consecutive tokens outside of any page, as stored: what tiers move.

    The same for both layouts; arrays of a backend that runs on the host may be numpy.
    """

    k: Array  # [tokens, kv_heads, k_width], the pages' dtype
    v: Array | None = None  # [tokens, kv_heads, v_width]
    k_scale: Array | None = None  # f32[tokens, kv_heads]
    v_scale: Array | None = None


def stored_dtype(physical: np.dtype) -> jnp.dtype:
    """The numbers that an array of `physical` dtype holds."""
    if physical == np.uint16:
        return jnp.dtype(jnp.bfloat16)
    return FLOAT8 if physical == np.uint8 else jnp.dtype(physical)


def decode_dtype(pages: Pages) -> jnp.dtype:
    """The dtype in which numbers of `pages` are computed with: float32 for scaled ones."""
    return jnp.dtype(jnp.float32) if pages.quantised else pages.dtype
