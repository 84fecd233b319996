"""What differs between the supported versions of jax (0.10.2, 0.11.2, 0.12), in one place."""

from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu

HBM = pltpu.HBM  # pl.ANY lets XLA move a small pool into VMEM in front of a kernel


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
