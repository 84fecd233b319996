"""Page operations as XLA gathers and scatters: any platform, either layout, in place when donated.

*Rows* are page contents of tokens: the pages' own tuple type with arrays `[tokens, kv_heads, ..]`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.pallas_kernels.page_ops.packing import pack_rows, pack_scales, split_scales
from kvjax.pallas_kernels.page_ops.pages import KVSpan, LayerPages, PackedPages, Pages
from kvjax.pallas_kernels.page_ops.quantise import decode, encode


def _past_the_end(ids: Array, size: int) -> Array:
    return jnp.where(ids < 0, size, ids)  # so that mode="drop" drops it


def empty_pool(pool: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding | None) -> Array:
    """See `kvjax.pallas_kernels.empty_pool`: zeros."""
    return jnp.zeros(pool.shape, pool.dtype, device=sharding)


def write_slots(pages: Pages, k: Array, v: Array | None, slots: Array) -> Pages:
    """See `kvjax.pallas_kernels.write_slots`."""
    physical = pages.k.dtype if isinstance(pages, LayerPages) else pages.kv.dtype
    k, k_scale = encode(jnp.asarray(k), physical)
    v_scale = None
    if v is not None:
        v, v_scale = encode(jnp.asarray(v), physical)
    return import_span(pages, KVSpan(k, v, k_scale, v_scale), slots)


def gather_slots(pages: Pages, slots: Array, widths) -> tuple[Array, Array | None]:
    """See `kvjax.pallas_kernels.gather_slots`."""
    span = export_span(pages, slots, widths)
    v = None if span.v is None else decode(span.v, span.v_scale)
    return decode(span.k, span.k_scale), v


def copy_pages(pages: Pages, src: Array, dst: Array) -> Pages:
    """See `kvjax.pallas_kernels.copy_pages`."""
    dst = _past_the_end(dst, pages.num_pages)

    def copy(pool) -> Array:
        pool = jnp.asarray(pool)  # numpy outside of jit
        return pool.at[dst].set(pool[src], mode="drop")

    return jax.tree.map(copy, pages)


def export_span(pages: Pages, slots: Array, widths) -> KVSpan:
    """See `kvjax.pallas_kernels.export_span`."""
    rows = load_rows(pages, slots)
    if isinstance(rows, LayerPages):
        return KVSpan(*rows)
    return unpack_span(rows, pages.kv_heads, widths)


def unpack_span(rows: PackedPages, kv_heads: int, widths) -> KVSpan:
    """Keys, values and scales of packed rows."""
    (k_width, v_width), half = widths, rows.kv.shape[-1] // 2
    v = None if v_width is None else rows.kv[..., half : half + v_width]
    return KVSpan(rows.kv[..., :k_width], v, *split_scales(rows.scale, kv_heads, v_width is None))


def pack_span(span: KVSpan, pages: PackedPages) -> PackedPages:
    """Packed rows of a span, as wide as those of `pages`."""
    scale = None
    if span.k_scale is not None and pages.scale is not None:
        scale = pack_scales(span.k_scale, span.v_scale, pages.scale.shape[1])
    return PackedPages(pack_rows(span.k, span.v, pages.kv.shape[3]), scale)


def import_span(pages: Pages, span: KVSpan, slots: Array) -> Pages:
    """See `kvjax.pallas_kernels.import_span`."""
    if isinstance(pages, LayerPages):
        return store_rows(pages, LayerPages(*span), slots)
    return store_rows(pages, pack_span(span, pages), slots)


def load_rows(pages: Pages, slots: Array) -> Pages:
    """Rows of the pages at `slots`, with zeros for a slot of -1."""
    slots = jnp.asarray(slots)
    page, offset = slots // pages.page_size, slots % pages.page_size

    def gather(pool) -> Array:
        rows = jnp.asarray(pool)[page, :, offset]
        return jnp.where((slots < 0).reshape(-1, *(1,) * (rows.ndim - 1)), 0, rows)

    return jax.tree.map(gather, pages)


def store_rows(pages: Pages, rows: Pages, slots: Array) -> Pages:
    """Pages with `rows` at `slots`; a slot of -1 is dropped."""
    slots = _past_the_end(slots, pages.num_pages * pages.page_size)
    page, offset = slots // pages.page_size, slots % pages.page_size

    def scatter(pool, new) -> Array:
        return jnp.asarray(pool).at[page, :, offset].set(jnp.asarray(new), mode="drop")

    return jax.tree.map(scatter, pages, rows)
