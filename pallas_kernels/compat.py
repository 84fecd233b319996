"""What differs between the supported versions of jax (0.10.2, 0.11.2, 0.12), in one place."""

import inspect
from typing import Any

from jax.experimental.pallas import mosaic_gpu


def load(ref: Any, layout: Any) -> Any:
    """The contents of `ref`, laid out in registers as `layout` says."""
    if "idx" in inspect.signature(mosaic_gpu.load).parameters:  # jax 0.10
        return mosaic_gpu.load(ref, (), layout=layout)
    return mosaic_gpu.load(ref, layout=layout)


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
