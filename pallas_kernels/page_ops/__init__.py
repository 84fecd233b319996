"""Making pages, and moving KV between tokens, pages and the world outside.

`write_slots`, `gather_slots` and `copy_pages` move numbers; `export_span` and `import_span` move
what is stored, bit for bit. Every function that changes pages consumes them: donate `pages` to the
jitted caller and the update is in place. Ids out of range, or repeated where they are written, are
a ValueError where their values are at hand; `checks=True` is for those that are being traced (see
`kvjax.pallas_kernels.checked`).
"""

import jax
from jaxtyping import Array, Float, Int

from kvjax.pallas_kernels.dispatch import Operation, later
from kvjax.pallas_kernels.page_ops import cpu, reference, xla
from kvjax.pallas_kernels.page_ops.arguments import (
    Widths,
    check_ids,
    check_moves,
    check_rows,
    vector,
    widths_of,
)
from kvjax.pallas_kernels.page_ops.packing import (
    pack_pages,
    packed_scale_shape,
    packed_width,
    split_pages,
)
from kvjax.pallas_kernels.page_ops.pages import (
    KVSpan,
    LayerPages,
    PackedPages,
    Pages,
    decode_dtype,
    stored_dtype,
)

__all__ = [
    "KVSpan",
    "LayerPages",
    "PackedPages",
    "Pages",
    "copy_pages",
    "decode_dtype",
    "empty_pool",
    "export_span",
    "gather_slots",
    "import_span",
    "pack_pages",
    "packed_scale_shape",
    "packed_width",
    "split_pages",
    "stored_dtype",
    "write_slots",
]


def _operation(name: str) -> Operation:
    operation = Operation(
        f"page_ops.{name}",
        {"*": ("xla",)},
        {"xla": getattr(xla, name), "reference": getattr(reference, name)},
        {"reference": "numpy on the host, the specification: only by name, outside jit"},
    )
    operation.register("tpu", later("kvjax.pallas_kernels.page_ops.tpu", name), platforms=("tpu",))
    operation.probes["tpu"] = later("kvjax.pallas_kernels.compat", "probe_tpu")
    return operation


_empty = Operation(
    "page_ops.empty_pool",
    {"cpu": ("cpu", "xla"), "*": ("xla",)},
    {"cpu": cpu.empty_pool, "xla": xla.empty_pool},
    probes={"cpu": cpu.probe},
)
_write, _gather, _copy = map(_operation, ("write_slots", "gather_slots", "copy_pages"))
_export, _import = map(_operation, ("export_span", "import_span"))
_copy.register("gpu", later("kvjax.pallas_kernels.page_ops.gpu", "copy_pages"), platforms=("gpu",))
_copy.probes["gpu"] = later("kvjax.pallas_kernels.hopper", "probe_copies")


def empty_pool(
    pool: jax.ShapeDtypeStruct,
    sharding: jax.sharding.Sharding | None = None,
    *,
    backend: str | None = None,
) -> Array:
    """An array of that shape and dtype whose content means nothing until it is written.

    On a CPU it takes memory as its pages are first written, if the machine has a C++ compiler.
    """
    return _empty(pool, sharding, backend=backend)


def write_slots(
    pages: Pages,
    k: Float[Array, "tokens kv_heads k_width"],
    v: Float[Array, "tokens kv_heads v_width"] | None,
    slots: Int[Array, " tokens"],
    *,
    checks: bool = False,
    backend: str | None = None,
) -> Pages:
    """Writes new keys and values to their slots; a slot of -1 is padding and is dropped.

    Numbers are rounded to what the pages hold; int8 and float8 pages get a scale per slot and head
    (`page_ops.quantise`). Two tokens never share a slot. Consumes `pages`.

    Raises:
      ValueError: shapes that do not fit each other, or values for pages that hold none.
    """
    check_rows(pages, k, v, slots)
    slots = check_ids("slots", slots, _last_slot(pages), checks, distinct=True)
    return _write(pages, k, v, slots, backend=backend)


def gather_slots(
    pages: Pages,
    slots: Int[Array, " tokens"],
    *,
    widths: Widths | None = None,
    checks: bool = False,
    backend: str | None = None,
) -> tuple[Array, Array | None]:
    """Keys and values at `slots`, `[tokens, kv_heads, width]`; a slot of -1 gives zeros.

    bfloat16 from bfloat16 pages, float32 otherwise. Packed pages need `widths`.

    Raises:
      ValueError: `slots` is not a vector, or packed pages without `widths`.
    """
    vector("slots", slots)
    slots = check_ids("slots", slots, _last_slot(pages), checks)
    return _gather(pages, slots, widths_of(pages, widths), backend=backend)


def copy_pages(
    pages: Pages,
    src: Int[Array, " n"],
    dst: Int[Array, " n"],
    *,
    checks: bool = False,
    backend: str | None = None,
) -> Pages:
    """Copies whole pages `src[i]` to `dst[i]` (copy-on-write); a `dst` of -1 is dropped.

    All sources are read before any destination is written. No two destinations are equal. Consumes
    `pages`.

    Raises:
      ValueError: `src` and `dst` are not vectors of one length.
    """
    if src.shape != dst.shape or len(src.shape) != 1:
        raise ValueError(f"expected as many sources as destinations, got {src.shape=} {dst.shape=}")
    src, dst = check_moves(pages.num_pages, src, dst, "pages", checks)
    return _copy(pages, src, dst, backend=backend)


def export_span(
    pages: Pages,
    slots: Int[Array, " tokens"],
    *,
    widths: Widths | None = None,
    checks: bool = False,
    backend: str | None = None,
) -> KVSpan:
    """What is stored at `slots`, in their order, contiguous and with its scales; -1 gives zeros.

    Neither dequantises nor rounds: `import_span` of the result restores every bit. Packed pages
    need `widths`; the result does not depend on the layout.

    Raises:
      ValueError: `slots` is not a vector, or packed pages without `widths`.
    """
    vector("slots", slots)
    slots = check_ids("slots", slots, _last_slot(pages), checks)
    return _export(pages, slots, widths_of(pages, widths), backend=backend)


def import_span(
    pages: Pages,
    span: KVSpan,
    slots: Int[Array, " tokens"],
    *,
    checks: bool = False,
    backend: str | None = None,
) -> Pages:
    """Stores an exported span at `slots`, bit for bit; a slot of -1 is dropped. Consumes `pages`.

    Raises:
      ValueError: the span's dtype, widths or scales are not those of the pages.
    """
    check_rows(pages, span.k, span.v, slots)
    physical = (pages.k if isinstance(pages, LayerPages) else pages.kv).dtype
    if span.k.dtype != physical or (span.k_scale is None) == pages.quantised:
        raise ValueError(
            f"the span holds {span.k.dtype} (scales: {span.k_scale is not None}), the pages "
            f"{physical} (scales: {pages.quantised})"
        )
    slots = check_ids("slots", slots, _last_slot(pages), checks, distinct=True)
    return _import(pages, span, slots, backend=backend)


def _last_slot(pages: Pages) -> int:
    return pages.num_pages * pages.page_size - 1
