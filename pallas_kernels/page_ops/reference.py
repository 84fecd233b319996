"""Page operations in numpy, slot by slot: the specification that backends are tested against."""

from typing import Any

import ml_dtypes
import numpy as np

from kvjax.pallas_kernels.page_ops import LayerPages


def _encode(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype == np.uint16:
        return np.asarray(x).astype(ml_dtypes.bfloat16).view(np.uint16)
    return np.asarray(x).astype(dtype)


def decode(x: np.ndarray) -> np.ndarray:
    """Float64 numbers of page contents."""
    x = np.asarray(x)
    return (x.view(ml_dtypes.bfloat16) if x.dtype == np.uint16 else x).astype(np.float64)


def write_slots(pages: LayerPages, k, v, slots) -> LayerPages:
    """See `kvjax.pallas_kernels.write_slots`; returns new arrays."""
    size = pages.page_size
    out: list[Any] = [None if pool is None else np.array(pool) for pool in pages]
    for t, slot in enumerate(np.asarray(slots)):
        for pool, new in zip(out, (k, v), strict=True):
            if slot >= 0 and pool is not None:
                pool[slot // size, :, slot % size] = _encode(new[t], pool.dtype)
    return LayerPages(*out)


def gather_slots(pages: LayerPages, slots) -> tuple[np.ndarray, np.ndarray | None]:
    """See `kvjax.pallas_kernels.gather_slots`."""
    size = pages.page_size

    def gather(pool):
        rows = [
            decode(pool)[s // size, :, s % size] if s >= 0 else np.zeros(pool.shape[1::2])
            for s in np.asarray(slots)
        ]
        return np.stack(rows)

    return gather(pages.k), None if pages.v is None else gather(pages.v)


def copy_pages(pages: LayerPages, src, dst) -> LayerPages:
    """See `kvjax.pallas_kernels.copy_pages`; returns new arrays."""

    def copy(pool) -> Any:
        out = np.array(pool)
        for s, d in zip(np.asarray(src), np.asarray(dst), strict=True):
            if d >= 0:
                out[d] = np.asarray(pool)[s]
        return out

    return LayerPages(copy(pages.k), None if pages.v is None else copy(pages.v))
