"""Warpgroup arithmetic for the Mosaic GPU kernels, and the same arithmetic under its interpreter.

The interpreter has no tensor cores and no register layouts. So the kernels take their products,
layouts and register budgets from a `Warpgroup`, which names the tensor-core instructions on a GPU
and plain `jnp` in interpret mode. Everything else of a kernel (copies, barriers, masks, the walk
over pages, the running softmax) is one code for both, and the interpreter tests it.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kvjax.pallas_kernels.compat import load
from kvjax.pallas_kernels.compat import mosaic_gpu as plgpu

ROWS = 64  # rows of a warpgroup's matrix product


@dataclasses.dataclass(frozen=True)
class Warpgroup:
    """What 128 threads do together. `interpret` replaces tensor cores and layouts by jnp."""

    interpret: Any = None

    def by_row(self, ref: Any) -> jax.Array:
        """A vector in shared memory as one number per row of a score matrix."""
        return ref[...] if self.interpret else load(ref, _WGMMA.reduce(1))

    def by_column(self, ref: Any) -> jax.Array:
        """A vector in shared memory as one number per column of a score matrix."""
        return ref[...] if self.interpret else load(ref, _WGMMA.reduce(0))

    def matrix(self, ref: Any, *, tiled: bool = True) -> jax.Array:
        """A matrix in shared memory, laid out in registers as an accumulator is."""
        return ref[...] if self.interpret else load(ref, _WGMMA, optimized=tiled)

    def scaled(self, ref: Any, scales: Any) -> jax.Array:
        """A matrix of int8 or float8 numbers in shared memory, times a number per row: float32."""
        if self.interpret:
            return ref[...].astype(jnp.float32) * scales[...][:, None]
        x, scale = load(ref, _STORED), load(scales, _STORED.reduce(1))
        x = x.astype(jnp.bfloat16 if x.dtype == jnp.int8 else jnp.float16).astype(jnp.float32)
        return x * plgpu.layout_cast(jax.lax.broadcast_in_dim(scale, x.shape, [0]), _STORED)

    def full(self, shape: tuple[int, ...], value: float) -> jax.Array:
        """A constant matrix, or vector with one number per row."""
        x = jnp.full(shape, value, jnp.float32)
        if self.interpret:
            return x
        return plgpu.layout_cast(x, _WGMMA if len(shape) == 2 else _WGMMA.reduce(1))

    def iota(self, shape: tuple[int, int], axis: int) -> jax.Array:
        """Row or column numbers of a score matrix, int32."""
        if self.interpret:
            return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_WGMMA)

    def scores(self, q: Any, k: Any) -> jax.Array:
        """`q @ k.T` of `q[rows, width]` and `k[keys, width]` in shared memory; float32."""
        if self.interpret:
            return _dot(_read(q), _read(k), 1)

        def product(acc: Any) -> jax.Array:
            plgpu.wgmma(acc, q, k.transpose((1, 0)))
            return acc[...]

        return pl.run_scoped(product, plgpu.ACC((q.shape[0], k.shape[0]), jnp.float32))

    def accumulate(self, acc: jax.Array, p: jax.Array, v: Any) -> Any:
        """`acc + p @ v` of `p[rows, keys]` in registers and `v[keys, width]` in shared memory."""
        if self.interpret:
            return acc + _dot(p, _read(v), 0)

        def product(ref: Any) -> None:
            plgpu.wgmma(ref, p, v)

        return pl.run_state(product)(plgpu.ACC.init(acc))

    def registers(self, count: int, action: Any) -> None:
        """Moves registers between the warpgroups of a block."""
        if not self.interpret:
            plgpu.set_max_registers(count, action=action)


_WGMMA: Any = plgpu.Layout.WGMMA
_STORED: Any = plgpu.Layout.WGMMA_UPCAST_2X  # four bytes of a row are neighbours in a thread


def _read(ref: Any) -> jax.Array:
    """Contents of shared memory as if tensor cores had read them, so that TMA may write next.

    They read through the same proxy as TMA; a plain load does not, and needs a fence.
    """
    x = ref[...]
    plgpu.commit_smem()
    return x


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
    )


def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory that TMA writes and the tensor cores read; the last two axes are the matrix."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


_ahead_of_time = contextvars.ContextVar("ahead_of_time", default=False)


@contextlib.contextmanager
def ahead_of_time() -> Iterator[None]:
    """Kernels traced in this context may be for a GPU that is not at hand."""
    token = _ahead_of_time.set(True)
    try:
        yield
    finally:
        _ahead_of_time.reset(token)


def require(interpret: Any = None, *, tensor_cores: bool = True) -> None:
    """Raises NotImplementedError where a Mosaic GPU kernel cannot run.

    Copies by TMA run from Hopper on; WGMMA, the tensor-core instruction used here, on Hopper only.
    """
    if interpret or _ahead_of_time.get():
        return
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"gpu: the platform is {jax.default_backend()}")
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    major = capability.partition(".")[0]
    if not major.isdigit():
        raise NotImplementedError("gpu: no NVIDIA GPU")
    if int(major) < 9:
        raise NotImplementedError(f"gpu: compute capability {capability} is below 9.0 (Hopper)")
    if tensor_cores and int(major) > 9:
        raise NotImplementedError(f"gpu: compute capability {capability} has no WGMMA")


def probe() -> None:
    """`require` for kernels with matrix products, as an operation's probe."""
    require()


def probe_copies() -> None:
    """`require` for kernels that only copy and rotate."""
    require(tensor_cores=False)
