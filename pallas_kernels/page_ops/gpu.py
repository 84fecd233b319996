"""Copying pages on NVIDIA GPUs from Hopper on: each page is read once and written once, by TMA.

Only the copy is here. Writing and gathering slots, and moving spans, stay with XLA: each is one
gather or one scatter of whole rows, in place when donated (quantised or not: `tests/aot/cuda.py`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from kvjax.pallas_kernels import hopper
from kvjax.pallas_kernels.compat import in_place
from kvjax.pallas_kernels.compat import mosaic_gpu as plgpu
from kvjax.pallas_kernels.page_ops.pages import LayerPages

_MOST = 200 * 1024  # bytes of a copy: they pass through shared memory
_BOX = 256  # rows, and columns, of a copy by TMA


def copy_pages(pages: LayerPages, src: Array, dst: Array, *, interpret: Any = None) -> LayerPages:
    """See `kvjax.pallas_kernels.copy_pages`.

    A source that is also a destination would be a race between thread blocks. Those, and only
    those, are put aside first; which they are is known on the device alone.
    """
    if not isinstance(pages, LayerPages):
        raise NotImplementedError(f"gpu: pages are {type(pages).__name__}, not in split layout")
    for pool in (pages.k, pages.v):
        if pool is None:
            continue
        row, size = pool.shape[3] * pool.dtype.itemsize, pool.shape[2]
        box = row if row % 16 else size * _columns(pool) * pool.dtype.itemsize
        if row % 16 or size > 256 or box > _MOST:
            raise NotImplementedError(f"gpu: a page of {size} times {row} bytes is no TMA box")
    hopper.require(interpret, tensor_cores=False)
    src, dst = jnp.asarray(src, jnp.int32), jnp.asarray(dst, jnp.int32)
    overwritten = jnp.zeros(pages.num_pages, bool)
    overwritten = overwritten.at[jnp.where(dst < 0, pages.num_pages, dst)].set(True, mode="drop")
    aside = overwritten[src] & (dst >= 0) & (src != dst)
    dst = jnp.where(src == dst, -1, dst)

    def copy(pool: Array | None) -> Array | None:
        return None if pool is None else _copy(pool, src, dst, aside, interpret)

    # A scale is 4 bytes a slot: XLA's copy through a temporary costs nothing that shows.
    scales = [None if x is None else _through_xla(x, src, dst) for x in pages[2:]]
    return LayerPages(_some(copy(pages.k)), copy(pages.v), *scales)


def _copy(pool: Array, src: Array, dst: Array, aside: Array, interpret: Any) -> Array:
    _, heads, size, width = pool.shape
    n, columns = src.shape[0], _columns(pool)

    def move(read: Any, page: Any, write: Any, to: Any, smem: Any, landed: Any) -> None:
        start = pl.multiple_of(jax.lax.axis_index("piece") * columns, columns)
        where = (jax.lax.axis_index("head"), slice(None), pl.ds(start, columns))
        plgpu.copy_gmem_to_smem(read.at[(page, *where)], smem, landed)
        plgpu.barrier_wait(landed)
        plgpu.copy_smem_to_gmem(smem, write.at[(to, *where)])
        plgpu.wait_smem_to_gmem(0)

    def put_aside(pool, src, aside, kept, smem, landed):
        i = jax.lax.axis_index("pair")

        @pl.when(aside[i] != 0)
        def _():
            move(pool, src[i], kept, i, smem, landed)

    def copy_pages(pool, kept, src, dst, aside, smem, landed):
        i = jax.lax.axis_index("pair")

        @pl.when((dst[i] >= 0) & (aside[i] == 0))
        def _():
            move(pool, src[i], pool, dst[i], smem, landed)

        @pl.when((dst[i] >= 0) & (aside[i] != 0))
        def _():
            move(kept, i, pool, dst[i], smem, landed)

    options: dict[str, Any] = {
        "scratch_types": {
            "smem": plgpu.SMEM((size, columns), pool.dtype),
            "landed": plgpu.Barrier(),
        },
        "grid": (heads, n, width // columns),
        "grid_names": ("head", "pair", "piece"),
        "interpret": interpret,
    }
    flags = aside.astype(jnp.int32)
    shelf = jax.ShapeDtypeStruct((n, heads, size, width), pool.dtype)
    kept = plgpu.kernel(put_aside, out_type=shelf, **options)(pool, src, flags)
    return in_place(copy_pages, pool, (kept, src, dst, flags), **options)


def _columns(pool: Array) -> int:
    """Columns of one copy: as many as a box holds, of rows in whole 16 bytes."""
    step, width = 16 // pool.dtype.itemsize, pool.shape[3]
    return max(n for n in range(step, min(width, _BOX) + 1, step) if width % n == 0)


def _through_xla(x: Array, src: Array, dst: Array) -> Array:
    return x.at[jnp.where(dst < 0, x.shape[0], dst)].set(x[src], mode="drop")


def _some(x: Array | None) -> Array:
    assert x is not None
    return x
