"""Moving KV between tokens and pages: `write_slots`, `gather_slots`, `copy_pages`."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.pallas_kernels.dispatch import Operation


class LayerPages(NamedTuple):
    """One layer's KV pages, split layout. `uint16` arrays hold the bits of bfloat16.

    XLA:CPU (jax 0.10) converts a whole bfloat16 pool around a scatter; integers stay in place.
    `v` is None where values are the leading channels of the keys (latent attention).
    """

    k: Array  # [pages, kv_heads, page_size, k_width]
    v: Array | None  # [pages, kv_heads, page_size, v_width]

    @property
    def page_size(self) -> int:
        """Slots per page."""
        return self.k.shape[2]

    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
        return self.k.shape[0]


class PackedPages(NamedTuple):
    """One layer's KV pages, packed layout of a TPU (`packed.py`)."""

    kv: Array  # [pages, kv_heads, page_size, lanes]
    scale: Array | None = None  # float32 [pages, rows, slots]


def decode_dtype(pages: LayerPages) -> jnp.dtype:
    """The dtype of the numbers in `pages` (bfloat16 where the array holds its bits)."""
    return jnp.dtype(jnp.bfloat16) if pages.k.dtype == jnp.uint16 else jnp.dtype(pages.k.dtype)


_write = Operation("page_ops.write_slots", {"*": ("xla",)})
_gather = Operation("page_ops.gather_slots", {"*": ("xla",)})
_copy = Operation("page_ops.copy_pages", {"*": ("xla",)})


def write_slots(
    pages: LayerPages,
    k: Float[Array, "tokens kv_heads k_width"],
    v: Float[Array, "tokens kv_heads v_width"] | None,
    slots: Int[Array, " tokens"],
    *,
    backend: str | None = None,
) -> LayerPages:
    """Writes new keys and values to their slots; a slot of -1 is padding and is dropped.

    Donate `pages` to the jitted caller and the write is in place. Two tokens never share a slot.
    """
    if slots.shape != k.shape[:1]:
        raise ValueError(f"expected one slot per token, got {slots.shape=} {k.shape=}")
    if (v is None) != (pages.v is None):
        raise ValueError(f"values given: {v is not None}, pages hold values: {pages.v is not None}")
    return _write(pages, k, v, slots, backend=backend)


def gather_slots(
    pages: LayerPages, slots: Int[Array, " tokens"], *, backend: str | None = None
) -> tuple[Array, Array | None]:
    """Keys and values at `slots`, `[tokens, kv_heads, width]`; a slot of -1 gives zeros."""
    return _gather(pages, slots, backend=backend)


def copy_pages(
    pages: LayerPages,
    src: Int[Array, " n"],
    dst: Int[Array, " n"],
    *,
    backend: str | None = None,
) -> LayerPages:
    """Copies whole pages `src[i]` to `dst[i]` (copy-on-write); a `dst` of -1 is dropped.

    All sources are read before any destination is written. Donate `pages` for an update in place.
    """
    if src.shape != dst.shape:
        raise ValueError(f"expected as many sources as destinations, got {src.shape=} {dst.shape=}")
    return _copy(pages, src, dst, backend=backend)


from kvjax.pallas_kernels.page_ops import reference, xla  # noqa: E402  (they need LayerPages)

for _op, _name in ((_write, "write_slots"), (_gather, "gather_slots"), (_copy, "copy_pages")):
    _op.implementations |= {"xla": getattr(xla, _name), "reference": getattr(reference, _name)}
    _op.notes["reference"] = "numpy on the host, the specification: only by name, outside jit"
