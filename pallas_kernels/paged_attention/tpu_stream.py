"""Pages on their way from the pool into VMEM, two blocks of keys at a time.

While one block is attended to, the next is copied: the next of the same item, or the first of the
next item that sees anything, so that the copies never pause between sequences. A page that no row
of the item may see is not copied.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kvjax.pallas_kernels.page_ops.pages import FLOAT8, stored_dtype
from kvjax.pallas_kernels.page_ops.quantise import from_bits, to_bits
from kvjax.pallas_kernels.paged_attention.tpu_items import Items

# One step after another, in order: buffers and running softmax are carried from step to step.
SEQUENTIAL = pltpu.CompilerParams(
    dimension_semantics=("arbitrary",), vmem_limit_bytes=48 * 1024 * 1024
)


class Geometry(NamedTuple):
    """Static facts of one call that both bodies share."""

    kv_heads: int
    group: int  # query heads per KV head
    page_size: int
    block: int  # keys per block, whole pages
    lanes: int  # of a slot in the pool
    q_lanes: int  # of a query row; equal to `lanes` where keys are not aligned on their own
    v_first: int  # values are the lanes [v_first, v_first + v_lanes)
    v_lanes: int
    tail_words: int
    scaled: bool
    latent: bool
    soft_cap: float | None
    with_lse: bool
    interpret: Any
    q_dtype: Any

    @property
    def pages_per_block(self) -> int:
        """Pages that one block of keys spans."""
        return self.block // self.page_size

    @property
    def value_scale_row(self) -> int:
        """Row of the first head's value scales; latent values share the scales of the keys."""
        return 0 if self.latent else self.kv_heads


class PageStream:
    """The double buffer of one kernel. `walk` is all that a body needs."""

    def __init__(self, geometry: Geometry, items: Items, tables, pool, scales, buffers) -> None:
        self.geometry, self.items, self.tables = geometry, items, tables
        self.pool, self.scales = pool, scales
        self.kv, self.kv_scales, self.arrived = buffers

    @staticmethod
    def scratch(geometry: Geometry, dtype, scale_rows: tuple[int, int]) -> tuple[Any, ...]:
        """Buffers and semaphores: `[2, kv_heads, block, lanes]`, and the scales page by page."""
        g = geometry
        scales = (2, g.pages_per_block, *scale_rows)
        return (
            pltpu.VMEM((2, g.kv_heads, g.block, g.lanes), dtype),
            pltpu.VMEM(scales, jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
        )

    def prime(self) -> None:
        """Starts the very first block of the grid."""
        items = self.items
        first = jnp.where(items.lo[0] < items.hi[0], 0, items.following[0])
        self._start_item(first)

    def _start_item(self, i) -> None:
        at = jnp.minimum(i, self.items.lo.shape[0] - 1)

        @pl.when(i < self.items.lo.shape[0])
        def _():
            self._start(at, self.items.lo[at] // self.geometry.block, self.items.parity[at])

    def _each_copy(self, i, block, slot, act: Callable[[Any], None]) -> None:
        """`act` on the copy of every page of the block that some row of item `i` may see."""
        g = self.geometry
        for j in range(g.pages_per_block):
            index = block * g.pages_per_block + j
            seen = (index * g.page_size < self.items.hi[i]) & (
                (index + 1) * g.page_size > self.items.lo[i]
            )

            @pl.when(seen)
            def _(index=index, j=j):
                page = self.tables[self.items.seq[i], index]
                rows = pl.ds(j * g.page_size, g.page_size)
                arrived = self.arrived.at[slot]
                act(pltpu.make_async_copy(self.pool.at[page], self.kv.at[slot, :, rows], arrived))
                if g.scaled:
                    act(
                        pltpu.make_async_copy(
                            self.scales.at[page], self.kv_scales.at[slot, j], arrived
                        )
                    )

    def _start(self, i, block, slot) -> None:
        self._each_copy(i, block, slot, lambda copy: copy.start())

    def _wait(self, i, block, slot) -> None:
        self._each_copy(i, block, slot, lambda copy: copy.wait())

    def walk(self, i, body: Callable[[Any, Any, Any], Any], state: Any) -> Any:
        """`state = body(first_key, slot, state)` for each block that item `i` sees, in order."""
        items, block = self.items, self.geometry.block
        first, end = items.lo[i] // block, pl.cdiv(items.hi[i], block)
        end = jnp.where(items.lo[i] < items.hi[i], end, first)

        def step(b, state):
            slot = (items.parity[i] + b - first) % 2

            @pl.when(b + 1 < end)
            def _():
                self._start(i, b + 1, 1 - slot)

            @pl.when(b + 1 == end)
            def _():
                self._start_item(items.following[i])

            self._wait(i, b, slot)
            return body(b * block, slot, state)

        return jax.lax.fori_loop(first, end, step, state)

    def may_hold_garbage(self, i, first_key) -> Any:
        """Whether the block has slots that no row of item `i` sees."""
        last = first_key + self.geometry.block
        return (first_key < self.items.whole_lo[i]) | (last > self.items.whole_hi[i])

    def clear_values(self, slot, alive) -> None:
        """Zeroes the slots whose `alive[1, block]` is 0, so that a NaN there stays there.

        Integers cannot hold one; where float8 does, `values` drops it.
        """
        g = self.geometry
        if self.kv.dtype.itemsize == 1:
            return
        column = jnp.transpose(jnp.broadcast_to(alive, (128, g.block)))[:, :1] > 0
        lanes = pl.ds(g.v_first, g.v_lanes)
        for h in range(g.kv_heads):
            rows = from_bits(self.kv[slot, h, :, lanes]).astype(jnp.float32)
            self.kv[slot, h, :, lanes] = to_bits(jnp.where(column, rows, 0.0), self.kv.dtype)

    def keys(self, slot, head: Any = slice(None)) -> jax.Array:
        """Keys of a block, `[(kv_heads,) block, q_lanes]`, in the dtype of the queries."""
        return _numbers(self.kv[slot, head, :, pl.ds(0, self.geometry.q_lanes)])

    def values(self, slot, head: Any = slice(None)) -> jax.Array:
        """Values of a block, `[(kv_heads,) block, v_lanes]`, free of NaN where nothing is seen."""
        g = self.geometry
        values = self.kv[slot, head, :, pl.ds(g.v_first, g.v_lanes)]
        float8 = stored_dtype(values.dtype) == FLOAT8
        values = _numbers(values)
        # a NaN that was written for this slot is still in the slot's scale
        return jnp.where(values == values, values, 0) if float8 else values

    def scale_row(self, slot, row) -> jax.Array:
        """Scales of one head over a block, `[1, block]`."""
        g = self.geometry
        pages = [
            self.kv_scales[slot, j, pl.ds(row, 1), pl.ds(0, g.page_size)]
            for j in range(g.pages_per_block)
        ]
        return jnp.concatenate(pages, axis=1)


def _numbers(x: jax.Array) -> jax.Array:
    """Page contents as the queries have them; int8 and float8 are exact in bfloat16."""
    x = from_bits(x)
    return x if x.dtype.itemsize > 1 else x.astype(jnp.float32).astype(jnp.bfloat16)


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Float32 product over one axis each; leading axes before the last two are batch axes."""
    batch = tuple(range(a.ndim - 2))
    return jax.lax.dot_general(
        a, b, (((contract[0] % a.ndim,), (contract[1] % b.ndim,)), (batch, batch)),
        precision=jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
