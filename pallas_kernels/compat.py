"""What differs between the supported versions of jax (0.10.2, 0.11.2, 0.12), in one place."""

import inspect
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu
from jax.experimental.pallas import tpu as pltpu

HBM = pltpu.HBM  # pl.ANY lets XLA move a small pool into VMEM in front of a kernel
mosaic_gpu: Any = _mosaic_gpu  # its names come and go between versions


def targets_tpu() -> bool:
    """Whether a trace made now is compiled for a TPU: the default one, or a deviceless topology."""
    if jax.default_backend() == "tpu":
        return True
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device is not None and device.device_kind.startswith("TPU")


def probe_tpu() -> None:
    """Raises NotImplementedError where kernels are not compiled for a TPU."""
    if not targets_tpu():
        raise NotImplementedError(f"tpu: the platform is {jax.default_backend()}")


def in_hbm(x: jax.Array, interpret: Any) -> jax.Array:
    """`x` as a kernel's argument that XLA leaves where it is, instead of copying it into VMEM."""
    return x if interpret else pltpu.with_memory_space_constraint(x, pltpu.HBM)


def tpu_interpreter(*, dma_execution_mode: str = "on_wait") -> Any:
    """`interpret=` of a TPU kernel whose races `tpu_races` reports.

    `eager` copies at once, so a missing wait is a race; `on_wait` copies at the wait, so that it
    leaves NaN in the buffer instead.
    """
    options: dict[str, Any] = {"dma_execution_mode": dma_execution_mode, "detect_races": True}
    if "on_race" in pltpu.InterpretParams.__dataclass_fields__:  # 0.12: else it would raise
        options["on_race"] = "warn"
    return pltpu.InterpretParams(**options)


def tpu_races() -> bool:
    """Whether the last kernel under `tpu_interpreter` raced. Forgets the interpreter's state."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    races = interpreter.races
    assert races is not None, "no kernel has run under tpu_interpreter"
    pltpu.reset_tpu_interpret_mode_state()
    return races.races_found


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
