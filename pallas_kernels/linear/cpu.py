"""Products with packed weights on a CPU as one C++ kernel, `cpu.cc`."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.pallas_kernels import native
from kvjax.pallas_kernels.linear import PANEL, Activation, Panels, gate

_TARGETS = ("kvjax_linear", "kvjax_int8_linear", "kvjax_gated_linear", "kvjax_int8_gated_linear")


def probe() -> None:
    """Raises NotImplementedError where the kernel cannot run at all."""
    if jax.default_backend() != "cpu":
        raise NotImplementedError(f"cpu: the platform is {jax.default_backend()}")
    for target in _TARGETS:
        native.register(Path(__file__).with_suffix(".cc"), target)


def linear(
    x: Array, w: Array | Panels, scale: Array | None, *, pad_single_row: bool = True
) -> Array:
    """See `kvjax.pallas_kernels.linear`."""
    del pad_single_row  # a row is the same chain of operations in every batch
    return _call("linear", x, w, scale, w.shape[:-1])


def gated_linear(
    x: Array,
    w: Array | Panels,
    scale: Array | None,
    *,
    activation: Activation,
    pad_single_row: bool = True,
) -> Array:
    """See `kvjax.pallas_kernels.gated_linear`: the halves meet while they are in registers."""
    del pad_single_row
    if w.shape[1] % PANEL:  # no panel is all gate or all up
        y = linear(x, w, scale)
        return gate(y[:, 0], y[:, 1], activation)
    return _call("gated_linear", x, w, scale, w.shape[1:2], gelu=activation == "gelu_tanh")


def _call(
    name: str, x: Array, w: Array | Panels, scale: Array | None, out: tuple[int, ...], **flags: Any
) -> Array:
    if not isinstance(w, Panels):
        raise NotImplementedError("cpu: the weights are not packed")
    probe()
    operands = [x.astype(jnp.float32), w.words]
    if scale is not None:
        name = f"int8_{name}"
        operands.append(scale.astype(jnp.float32).reshape(-1))
    shape = jax.ShapeDtypeStruct((x.shape[0], math.prod(out)), jnp.float32)
    y = jax.ffi.ffi_call(f"kvjax_{name}", shape)(*operands, **flags)
    return y.reshape(x.shape[0], *out)
