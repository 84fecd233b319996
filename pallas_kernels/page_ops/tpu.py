"""Page operations on packed pages as Mosaic TPU kernels, in place when donated.

Quantisation is XLA's, in front of the kernel that stores.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kvjax.pallas_kernels import compat
from kvjax.pallas_kernels.page_ops import tpu_rows, xla
from kvjax.pallas_kernels.page_ops.packing import pack_rows
from kvjax.pallas_kernels.page_ops.pages import KVSpan, PackedPages, Pages
from kvjax.pallas_kernels.page_ops.quantise import decode, encode

_STAGE_BYTES = 32 * 1024 * 1024  # of VMEM for pages on their way


def supported(pages: Pages, interpret: Any = False) -> PackedPages:
    """The pages, or NotImplementedError with the reason."""
    if not isinstance(pages, PackedPages):
        raise NotImplementedError("tpu: pages are split; the kernels move packed pages")
    if not interpret:
        compat.probe_tpu()
    tpu_rows.stored_pool(pages)
    return pages


def write_slots(pages: Pages, k: Array, v: Array | None, slots: Array, *, interpret=False) -> Pages:
    """See `kvjax.pallas_kernels.write_slots`."""
    packed = supported(pages, interpret)
    physical = packed.kv.dtype
    if packed.quantised:
        k, v = _read_once(jnp.asarray(k), None if v is None else jnp.asarray(v), packed)
    k, k_scale = encode(jnp.asarray(k), physical)
    v_scale = None
    if v is not None:
        v, v_scale = encode(jnp.asarray(v), physical)
    return import_span(pages, KVSpan(k, v, k_scale, v_scale), slots, interpret=interpret)


def _read_once(k: Array, v: Array | None, pages: PackedPages) -> tuple[Array, Array | None]:
    """The same rows, brought into VMEM: they are read for their scales, then to be rounded."""
    rows = jax.lax.optimization_barrier(pack_rows(k, v, pages.kv.shape[3]))
    half = pages.kv.shape[3] // 2
    return rows[..., : k.shape[2]], None if v is None else rows[..., half : half + v.shape[2]]


def gather_slots(pages: Pages, slots: Array, widths, *, interpret=False) -> tuple[Any, Any]:
    """See `kvjax.pallas_kernels.gather_slots`."""
    span = export_span(pages, slots, widths, interpret=interpret)
    v = None if span.v is None else decode(span.v, span.v_scale)
    return decode(span.k, span.k_scale), v


def export_span(pages: Pages, slots: Array, widths, *, interpret=False) -> KVSpan:
    """See `kvjax.pallas_kernels.export_span`."""
    packed = supported(pages, interpret)
    rows = load_rows(packed, slots, interpret=interpret)
    return xla.unpack_span(rows, packed.kv_heads, widths)


def import_span(pages: Pages, span: KVSpan, slots: Array, *, interpret=False) -> Pages:
    """See `kvjax.pallas_kernels.import_span`."""
    packed = supported(pages, interpret)
    return store_rows(packed, xla.pack_span(span, packed), slots, interpret=interpret)


def load_rows(
    pages: PackedPages, slots: Array, *, half: int | None = None, interpret: Any = False
) -> PackedPages:
    """Rows of the pages at `slots`, `[tokens, kv_heads, lanes]`; zeros for a slot of -1.

    With `half`, only the first (0) or second (1) half of the lanes.
    """
    slots = jnp.asarray(slots)
    if slots.shape[0] > tpu_rows.MOST_RUNS:
        parts = [
            load_rows(pages, part, half=half, interpret=interpret) for part in tpu_rows.parts(slots)
        ]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    tokens, rows = slots.shape[0], tpu_rows.tile_rows(pages.kv.dtype)
    token = jnp.arange(tokens, dtype=jnp.int32)
    todo = tpu_rows.runs(slots, jnp.where(slots < 0, -1, token), rows)
    tiles = tpu_rows.merge_rows(
        pages.kv, None, todo, num_tiles=-(-tokens // rows), half=half, interpret=interpret,
        name="load_rows",
    )  # fmt: skip
    kv = jnp.where((slots < 0)[:, None, None], 0, tpu_rows.from_tiles(tiles, tokens))
    if pages.scale is None:
        return PackedPages(kv)
    size = pages.page_size
    tiles = tpu_rows.merge_rows(
        pages.scale[:, None], None, tpu_rows.runs(slots, jnp.where(slots < 0, -1, token), size),
        num_tiles=-(-tokens // size), per_lane=size, interpret=interpret, name="load_scales",
    )  # fmt: skip
    scale = tpu_rows.from_lane_tiles(tiles, size, tokens)
    return PackedPages(kv, jnp.where((slots < 0)[:, None], 0, scale))


def store_rows(
    pages: PackedPages, rows: PackedPages, slots: Array, *, key_lanes: int | None = None,
    interpret: Any = False,
) -> PackedPages:  # fmt: skip
    """Pages with `rows` at `slots`; a slot of -1 is dropped.

    With `key_lanes`, only these leading lanes and the scales of the keys: values stay.
    """
    slots = jnp.asarray(slots)
    if slots.shape[0] > tpu_rows.MOST_RUNS:
        for part, now in zip(tpu_rows.parts(slots), _row_parts(rows), strict=True):
            pages = store_rows(pages, now, part, key_lanes=key_lanes, interpret=interpret)
        return pages
    keys = None if key_lanes is None else _leading(2, key_lanes)
    key_scales = None if key_lanes is None else _leading(1, pages.kv_heads)
    token = jnp.arange(slots.shape[0], dtype=jnp.int32)
    todo = tpu_rows.runs(token, slots, tpu_rows.tile_rows(pages.kv.dtype))
    source = tpu_rows.as_tiles(rows.kv, pages.kv.dtype)
    kv = tpu_rows.merge_rows(
        source, pages.kv, todo, combine=keys, interpret=interpret, name="store_rows"
    )
    if pages.scale is None or rows.scale is None:
        return PackedPages(kv)
    size = pages.page_size
    scale = tpu_rows.merge_rows(
        tpu_rows.as_lane_tiles(rows.scale, size, pages.scale.shape[2]), pages.scale[:, None],
        tpu_rows.runs(token, slots, size), per_lane=size, combine=key_scales, interpret=interpret,
        name="store_scales",
    )  # fmt: skip
    return PackedPages(kv, scale[:, 0])


def _leading(axis: int, count: int) -> Callable[[Array, Array], Array]:
    """What takes the first `count` along an axis from the new rows and the rest from the old."""

    def merge(old: Array, new: Array) -> Array:
        return jnp.where(jax.lax.broadcasted_iota(jnp.int32, new.shape, axis) < count, new, old)

    return merge


def _row_parts(rows: PackedPages) -> list[PackedPages]:
    scales = [None] * len(tpu_rows.parts(rows.kv))
    if rows.scale is not None:
        scales = tpu_rows.parts(rows.scale)
    return list(map(PackedPages, tpu_rows.parts(rows.kv), scales))


def copy_pages(pages: Pages, src: Array, dst: Array, *, interpret: Any = False) -> Pages:
    """See `kvjax.pallas_kernels.copy_pages`."""
    packed = supported(pages, interpret)
    src, dst = jnp.asarray(src), jnp.asarray(dst)
    scale = packed.scale
    if scale is not None:
        scale = _copy(scale[:, None], src, dst, interpret)[:, 0]
    return PackedPages(_copy(packed.kv, src, dst, interpret), scale)


def _copy(pool: Array, src: Array, dst: Array, interpret: Any) -> Array:
    """Copies head by head through VMEM: of one head all sources are read before any is written."""
    n, (_, heads, *slab) = src.shape[0], pool.shape
    staged = 2 * n * slab[0] * slab[1] * pool.dtype.itemsize
    if staged > _STAGE_BYTES:
        raise NotImplementedError(f"tpu: {n} pages of a head need {staged} bytes of VMEM to copy")

    def body(src_ref, dst_ref, _, out, stage, read, written):
        def each(act):
            jax.lax.fori_loop(0, n, lambda i, _: act(i), None)

        def load(h, i):
            return pltpu.make_async_copy(out.at[src_ref[i], h], stage.at[h % 2, i], read.at[h % 2])

        def store(h, i):
            at = jnp.maximum(dst_ref[i], 0)
            return pltpu.make_async_copy(stage.at[h % 2, i], out.at[at, h], written.at[h % 2])

        def wanted(act):
            def when(i):
                pl.when(dst_ref[i] >= 0)(lambda: act(i))

            return when

        def head(h, carry):
            each(wanted(lambda i: load(h, i).wait()))
            each(wanted(lambda i: store(h, i).start()))

            @pl.when(h + 1 < heads)
            def _():
                pl.when(h > 0)(lambda: each(wanted(lambda i: store(h - 1, i).wait())))
                each(wanted(lambda i: load(h + 1, i).start()))

            return carry

        each(wanted(lambda i: load(0, i).start()))
        jax.lax.fori_loop(0, heads, head, 0)
        for h in range(max(heads - 2, 0), heads):
            each(wanted(lambda i, h=h: store(h, i).wait()))

    bytes_moved = heads * staged
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=compat.HBM)],
            out_specs=pl.BlockSpec(memory_space=compat.HBM),
            scratch_shapes=[
                pltpu.VMEM((2, n, *slab), pool.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        input_output_aliases={2: 0},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_STAGE_BYTES + (8 << 20)),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=bytes_moved),
        interpret=interpret,
        name="copy_pages",
    )(src, dst, pool)
