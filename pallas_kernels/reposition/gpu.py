"""Rotating keys where they lie, on NVIDIA GPUs from Hopper on: one read, one write, no temporary.

Only `rotary_shift` is here. A move to other slots reads all sources before it writes, so it needs a
temporary whoever does it, and XLA's gather and scatter are that; so do patches.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from kvjax.pallas_kernels import hopper
from kvjax.pallas_kernels.compat import in_place, store
from kvjax.pallas_kernels.compat import mosaic_gpu as plgpu
from kvjax.pallas_kernels.hopper import ROWS
from kvjax.pallas_kernels.page_ops.pages import LayerPages

_MOST = 64 * 1024  # bytes of keys in flight per thread block


def reposition(
    pages: LayerPages, src_slots, dst_slots, cos, sin, *,
    patch_k=None, patch_v=None, frame="source", rotary_offset=0, interpret=None,
) -> LayerPages:  # fmt: skip
    """See `kvjax.pallas_kernels.reposition`; `dst_slots` is None for `rotary_shift`.

    A thread block takes 64 tokens. If they are 64 consecutive slots of one page, their keys come
    in one copy; otherwise slot by slot.
    """
    del frame
    if not isinstance(pages, LayerPages):
        raise NotImplementedError(f"gpu: pages are {type(pages).__name__}, not in split layout")
    if dst_slots is not None or patch_k is not None or patch_v is not None:
        raise NotImplementedError("gpu: moves and patches need a temporary, which xla has as well")
    if pages.quantised:
        raise NotImplementedError(f"gpu: {pages.dtype} keys get new scales, which xla computes")
    if pages.dtype != jnp.bfloat16:
        raise NotImplementedError(f"gpu: keys are {pages.dtype}, not bfloat16")
    width, half = pages.k.shape[3], cos.shape[1]
    if width % 16 or width > 256 or half % 8 or rotary_offset % 8:
        raise NotImplementedError(f"gpu: {half} pairs from {rotary_offset} of {width} channels")
    hopper.require(interpret, tensor_cores=False)
    bits = pages.k.dtype == jnp.uint16
    pool = jax.lax.bitcast_convert_type(pages.k, jnp.bfloat16) if bits else pages.k
    pool = _rotate(pool, src_slots, cos, sin, rotary_offset, interpret)
    k = jax.lax.bitcast_convert_type(pool, jnp.uint16) if bits else pool
    return LayerPages(k, *pages[1:])


def _rotate(pool: Array, slots: Any, cos: Any, sin: Any, first: int, interpret: Any) -> Array:
    _, kv_heads, page_size, width = pool.shape
    n, half = cos.shape
    missing = -n % ROWS
    slots = jnp.pad(jnp.asarray(slots, jnp.int32), (0, missing), constant_values=-1)
    cos, sin = (jnp.pad(jnp.asarray(x, jnp.float32), ((0, missing), (0, 0))) for x in (cos, sin))
    blocks = slots.reshape(-1, ROWS)
    piece = min(ROWS, page_size)
    runs = _runs(blocks, piece)
    heads = heads_at_once(kv_heads, width, half)
    pieces = [(h, i) for h in range(heads) for i in range(ROWS // piece)]
    g = hopper.Warpgroup(interpret)

    def rotary_shift(pool, slots, runs, cos, sin, k_smem, cos_smem, sin_smem, **landed):
        block = jax.lax.axis_index("block")
        base = jax.lax.axis_index("heads") * heads
        run = runs[block, 0] >= 0
        plgpu.copy_gmem_to_smem(cos.at[pl.ds(block * ROWS, ROWS)], cos_smem, landed["tables"])
        plgpu.copy_gmem_to_smem(sin.at[pl.ds(block * ROWS, ROWS)], sin_smem, landed["tables"])

        def part(h: int, i: int) -> tuple[Any, Any]:
            """A run of slots in the pool and in shared memory."""
            slot = runs[block, i]
            start = pl.multiple_of(jax.lax.rem(slot, page_size), piece)
            box = pool.at[jax.lax.div(slot, page_size), base + h, pl.ds(start, piece)]
            return box, k_smem.at[h, pl.ds(i * piece, piece)]

        def row(h: int, t: Any, slot: Any) -> tuple[Any, Any]:
            """One slot in the pool and in shared memory."""
            page, offset = jax.lax.div(slot, page_size), jax.lax.rem(slot, page_size)
            return pool.at[page, base + h, offset], k_smem.at[h, t]

        @pl.when(run)
        def _():
            for h, i in pieces:
                box, smem = part(h, i)
                plgpu.copy_gmem_to_smem(box, smem, landed["pieces"])
            plgpu.barrier_wait(landed["pieces"])

        @pl.when(jnp.logical_not(run))
        def _():
            @pl.loop(0, ROWS)
            def _(t):
                for h in range(heads):  # padding reads slot 0 and is never written
                    at, smem = row(h, t, jnp.maximum(slots[block, t], 0))
                    plgpu.copy_gmem_to_smem(at, smem, landed["rows"])

            plgpu.barrier_wait(landed["rows"])

        plgpu.barrier_wait(landed["tables"])
        c, s = g.matrix(cos_smem, tiled=False), g.matrix(sin_smem, tiled=False)
        for h in range(heads):
            low = k_smem.at[h, :, pl.ds(first, half)]
            high = k_smem.at[h, :, pl.ds(first + half, half)]
            a, b = (g.matrix(x, tiled=False).astype(jnp.float32) for x in (low, high))
            store(low, (a * c - b * s).astype(pool.dtype))
            store(high, (b * c + a * s).astype(pool.dtype))
        plgpu.commit_smem()

        @pl.when(run)
        def _():
            for h, i in pieces:
                box, smem = part(h, i)
                plgpu.copy_smem_to_gmem(smem, box)

        @pl.when(jnp.logical_not(run))
        def _():
            @pl.loop(0, ROWS)
            def _(t):
                @pl.when(slots[block, t] >= 0)
                def _():
                    for h in range(heads):
                        at, smem = row(h, t, slots[block, t])
                        plgpu.copy_smem_to_gmem(smem, at)

        plgpu.wait_smem_to_gmem(0)

    return in_place(
        rotary_shift,
        pool,
        (blocks, runs, cos, sin),
        scratch_types={
            "k_smem": plgpu.SMEM((heads, ROWS, width), pool.dtype),
            "cos_smem": plgpu.SMEM((ROWS, half), jnp.float32),
            "sin_smem": plgpu.SMEM((ROWS, half), jnp.float32),
            "tables": plgpu.Barrier(num_arrivals=2),
            "pieces": plgpu.Barrier(num_arrivals=len(pieces)),
            "rows": plgpu.Barrier(num_arrivals=heads * ROWS),
        },
        grid=(kv_heads // heads, blocks.shape[0]),
        grid_names=("heads", "block"),
        # Layout inference (the default of jax 0.12) has no untiled matrices.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )


def _runs(blocks: Array, piece: int) -> Array:
    """First slot of each run of `piece` slots, `[blocks, 64 / piece]`; -1 if any is no run."""
    cut = blocks.reshape(blocks.shape[0], -1, piece)
    start = cut[:, :, :1]
    run = (cut == start + jnp.arange(piece, dtype=jnp.int32)) & (start >= 0) & (start % piece == 0)
    return jnp.where(jnp.all(run, axis=(1, 2))[:, None], start[:, :, 0], -1)


def heads_at_once(kv_heads: int, width: int, half: int) -> int:
    """Heads of a thread block, which reads the tables once for all of them.

    Beside the tables of 128 pairs no second thread block fits, so the first takes twice as many.
    """
    wide = 2 * ROWS * half * 4 >= _MOST
    most = max(1, (2 * _MOST if wide else _MOST) // (ROWS * width * 2))
    return max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n <= most)
