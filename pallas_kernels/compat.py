"""What differs between the supported versions of jax (0.10.2, 0.11.2, 0.12), in one place."""

import inspect
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu

mosaic_gpu: Any = _mosaic_gpu  # its names come and go between versions


def load(ref: Any, layout: Any, *, optimized: bool = True) -> Any:
    """The contents of `ref`, laid out in registers as `layout` says.

    `optimized` fails to compile where the loads would be slow.
    """
    if "idx" in inspect.signature(mosaic_gpu.load).parameters:  # jax 0.10
        return mosaic_gpu.load(ref, (), layout=layout, optimized=optimized)
    return mosaic_gpu.load(ref, layout=layout, optimized=optimized)


def store(ref: Any, value: Any) -> None:
    """`ref[...] = value`, also where the stores will be slow (jax 0.12 asks to be told)."""
    if hasattr(mosaic_gpu, "store"):
        mosaic_gpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def in_place(kernel: Any, pool: jax.Array, inputs: tuple[Any, ...], **options: Any) -> jax.Array:
    """Runs a Mosaic GPU kernel on `pool`, its first argument, which it changes in place.

    Donate the pool to the jitted caller and nothing of its size is copied.
    """
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(f"gpu: jax {jax.__version__} has no in-place Mosaic GPU kernels")
    ref = jax.new_ref(pool)
    mosaic_gpu.kernel(kernel, out_type=(), **options)(ref, *inputs)
    return jax.freeze(ref)


def transposed(ref: Any) -> Any:
    """A view of the matrix `ref` in shared memory with its two axes exchanged."""
    if hasattr(ref, "transpose"):  # jax 0.12
        return ref.transpose((1, 0))
    return mosaic_gpu.transpose_ref(ref, (1, 0))


def interpret_gpu(**params: Any) -> Any:
    """Parameters that run a Mosaic GPU kernel in its interpreter; private in jax 0.10."""
    if hasattr(mosaic_gpu, "InterpretGPUParams"):
        return mosaic_gpu.InterpretGPUParams(**params)
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(**params)


def gpu_races() -> bool:
    """Whether the last kernel in the Mosaic GPU interpreter raced (jax 0.10 does not raise)."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    return bool(gpu_callbacks.get_races().races_found)
