"""Page operations in numpy, slot by slot: the specification that backends are tested against."""

from typing import Any

import ml_dtypes
import numpy as np

from kvjax.pallas_kernels.page_ops.pages import KVSpan, LayerPages, Pages, stored_dtype

_LIMITS = {np.dtype(np.int8): 127.0, np.dtype(ml_dtypes.float8_e4m3fn): 448.0}


def encode(x, physical: np.dtype) -> tuple[np.ndarray, np.ndarray | None]:
    """Page contents of rows, in float32 arithmetic, and the scale of each where there is one."""
    x, dtype = np.asarray(x).astype(np.float32), np.dtype(stored_dtype(physical))
    if dtype not in _LIMITS:
        return x.astype(dtype).view(physical), None
    largest = np.maximum(np.abs(x).max(axis=-1), np.float32(1e-30))
    scale = largest * np.float32(1 / _LIMITS[dtype])
    with np.errstate(invalid="ignore"):  # NaN and infinity become some number with a scale of NaN
        x = x / scale[..., None]
        stored = np.rint(x).astype(dtype) if dtype == np.int8 else x.astype(dtype)
    return stored.view(physical), scale


def decode(x, scale=None) -> np.ndarray:
    """Float64 numbers of page contents."""
    x = np.asarray(x)
    numbers = x.view(stored_dtype(x.dtype)).astype(np.float64)
    return numbers if scale is None else numbers * np.asarray(scale, np.float64)[..., None]


def split_only(pages: Pages) -> LayerPages:
    """The pages, unless they are packed: those are compared through `split_pages`."""
    if not isinstance(pages, LayerPages):
        raise NotImplementedError("reference: packed pages; compare split_pages of them")
    return pages


def write_slots(pages: Pages, k, v, slots) -> LayerPages:
    """See `kvjax.pallas_kernels.write_slots`; returns new arrays."""
    physical = split_only(pages).k.dtype
    k, k_scale = encode(k, physical)
    v, v_scale = (None, None) if v is None else encode(v, physical)
    return import_span(pages, KVSpan(k, v, k_scale, v_scale), slots)  # type: ignore[arg-type]


def gather_slots(pages: Pages, slots, widths=None) -> tuple[np.ndarray, np.ndarray | None]:
    """See `kvjax.pallas_kernels.gather_slots`; float64."""
    span = export_span(pages, slots)
    return decode(span.k, span.k_scale), None if span.v is None else decode(span.v, span.v_scale)


def copy_pages(pages: Pages, src, dst) -> LayerPages:
    """See `kvjax.pallas_kernels.copy_pages`; returns new arrays."""

    def copy(pool) -> Any:
        if pool is None:
            return None
        out = np.array(pool)
        for s, d in zip(np.asarray(src), np.asarray(dst), strict=True):
            if d >= 0:
                out[d] = np.asarray(pool)[s]
        return out

    return LayerPages(*map(copy, split_only(pages)))


def export_span(pages: Pages, slots, widths=None) -> KVSpan:
    """See `kvjax.pallas_kernels.export_span`."""
    size = split_only(pages).page_size

    def gather(pool) -> Any:
        if pool is None:
            return None
        pool = np.asarray(pool)
        out = np.zeros((len(slots), *np.delete(pool.shape, (0, 2))), pool.dtype)
        for t, slot in enumerate(np.asarray(slots)):
            if slot >= 0:
                out[t] = pool[slot // size, :, slot % size]
        return out

    return KVSpan(*map(gather, pages))


def import_span(pages: Pages, span: KVSpan, slots) -> LayerPages:
    """See `kvjax.pallas_kernels.import_span`; returns new arrays."""
    size = split_only(pages).page_size
    out: list[Any] = [None if pool is None else np.array(pool) for pool in pages]
    for pool, rows in zip(out, span, strict=True):
        for t, slot in enumerate(np.asarray(slots)):
            if slot >= 0 and pool is not None and rows is not None:
                pool[slot // size, :, slot % size] = np.asarray(rows)[t]
    return LayerPages(*out)
