"""Rows times weights: `x @ w.T` for weights of any number of output axes, `[*out, in]`.

A row gives the same bits in every batch. On a CPU with a C++ compiler weights are packed when they
are loaded (`pack`), and one kernel reads them as a stream, at the speed of memory for few rows.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8

from kvjax.pallas_kernels.dispatch import Operation

PANEL = 32  # output channels of a panel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Panels:
    """Weights `[*out, in]` as the CPU kernel reads them: panels of 32 output channels.

    A word is 4 bytes along the input: one float32, two bfloat16, four int8. Channels and inputs
    are padded with zeros to whole panels and words.
    """

    words: Array  # [panels, words, PANEL, numbers in a word]
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # [*out, in]

    def rows(self, ids: Int[Array, " n"]) -> Array:
        """Weights of the output channels `ids`, `[n, in]`, of a matrix with one output axis."""
        found = self.words[ids // PANEL, :, ids % PANEL]
        return found.reshape(ids.shape[0], -1)[:, : self.shape[-1]]


Activation = Literal["silu", "gelu_tanh"]

_linear = Operation("linear", {"cpu": ("cpu", "xla"), "*": ("xla",)})
_gated_linear = Operation("gated_linear", {"cpu": ("cpu", "xla"), "*": ("xla",)})


def packs() -> bool:
    """Whether this machine has the kernel that `pack` packs for."""
    try:
        cpu.probe()
    except NotImplementedError:
        return False
    return True


def pack(w: np.ndarray) -> np.ndarray:
    """The words of `Panels` of a float32, bfloat16 or int8 array `[*out, in]`."""
    per_word = 4 // w.dtype.itemsize
    out, in_ = math.prod(w.shape[:-1]), w.shape[-1]
    flat = np.pad(w.reshape(out, in_), ((0, -out % PANEL), (0, -in_ % per_word)))
    words = np.ascontiguousarray(flat).view(np.uint32).reshape(-1, PANEL, flat.shape[1] // per_word)
    words = np.ascontiguousarray(words.swapaxes(1, 2))
    return words[..., None].view(w.dtype)


def linear(
    x: Float[Array, "rows in_"],
    w: Float[Array, "*out in_"] | Int8[Array, "*out in_"] | Panels,
    scale: Float[Array, "*out"] | None = None,
    *,
    pad_single_row: bool = True,
    backend: str | None = None,
) -> Float[Array, "rows *out"]:
    """Float32 `x @ w.T`: `x` is rounded to the dtype of `w`, sums are float32.

    With a `scale` per output channel `w` is int8 and stands for `w * scale`: `x` is quantised per
    row (`quantise_rows`), and the sums are int32.

    `pad_single_row=False` lets XLA:CPU keep one row one row: faster for float32, but then a
    request's bits depend on whether it runs alone. Packed weights need neither.
    """
    return _linear(x, w, scale, pad_single_row=pad_single_row, backend=backend)


def gated_linear(
    x: Float[Array, "rows in_"],
    w: Float[Array, "2 half in_"] | Int8[Array, "2 half in_"] | Panels,
    scale: Float[Array, "2 half"] | None = None,
    *,
    activation: Activation,
    pad_single_row: bool = True,
    backend: str | None = None,
) -> Float[Array, "rows half"]:
    """`activation(y[:, 0]) * y[:, 1]` of `y = linear(x, w, scale)` (arXiv 2002.05202)."""
    if w.shape[0] != 2 or len(w.shape) != 3:
        raise ValueError(f"gated weights are [2, half, in], got {w.shape}")
    return _gated_linear(
        x, w, scale, activation=activation, pad_single_row=pad_single_row, backend=backend
    )


def gate(
    gate: Float[Array, "rows half"], up: Float[Array, "rows half"], activation: Activation
) -> Float[Array, "rows half"]:
    """`activation(gate) * up`."""
    act = jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate, approximate=True)
    return act * up


def quantise_rows(
    x: Float[Array, "*rows n"],
) -> tuple[Int8[Array, "*rows n"], Float[Array, "*rows 1"]]:
    """Symmetric int8 with one float32 scale per row: `x ~ q * scale`."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-8) / 127
    return jnp.round(x / scale).astype(jnp.int8), scale


from kvjax.pallas_kernels.linear import cpu, xla  # noqa: E402  (they need Panels)

_linear.implementations |= {"cpu": cpu.linear, "xla": xla.linear}
_gated_linear.implementations |= {"cpu": cpu.gated_linear, "xla": xla.gated_linear}
_linear.probes["cpu"] = _gated_linear.probes["cpu"] = cpu.probe
