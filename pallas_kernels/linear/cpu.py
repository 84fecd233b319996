"""Products with packed weights on a CPU as one C++ kernel, `cpu.cc`."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.pallas_kernels import native
from kvjax.pallas_kernels.linear import Panels

_TARGETS = ("kvjax_linear", "kvjax_int8_linear")


def probe() -> None:
    """Raises NotImplementedError where the kernel cannot run at all."""
    if jax.default_backend() != "cpu":
        raise NotImplementedError(f"cpu: the platform is {jax.default_backend()}")
    for target in _TARGETS:
        native.register(Path(__file__).with_suffix(".cc"), target)


def linear(x: Array, w: Array | Panels, *, pad_single_row: bool = True) -> Array:
    """See `kvjax.pallas_kernels.linear`."""
    del pad_single_row  # a row is the same chain of operations in every batch
    return _call(_TARGETS[0], x, w)


def int8_linear(x: Array, w: Array | Panels, w_scale: Array) -> Array:
    """See `kvjax.pallas_kernels.int8_linear`."""
    return _call(_TARGETS[1], x, w, w_scale.astype(jnp.float32).reshape(-1))


def _call(target: str, x: Array, w: Array | Panels, *scales: Array) -> Array:
    if not isinstance(w, Panels):
        raise NotImplementedError("cpu: the weights are not packed")
    probe()
    rows, out = x.shape[0], w.shape[:-1]
    shape = jax.ShapeDtypeStruct((rows, math.prod(out)), jnp.float32)
    y = jax.ffi.ffi_call(target, shape)(x.astype(jnp.float32), w.words, *scales)
    return y.reshape(rows, *out)
