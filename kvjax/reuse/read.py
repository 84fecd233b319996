"""Stored KV as numbers: gathered, dequantised, keys turned to where a strategy wants them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kvjax.cache.pages import KVPages, KVSpec
from kvjax.models import Transformer
from kvjax.pallas_kernels import gather_slots
from kvjax.pallas_kernels.reposition.rotation import rotate
from kvjax.reuse.forward import rung


@dataclasses.dataclass(frozen=True)
class ReadShape:
    """The shape of one read program."""

    tokens: int

    def __str__(self) -> str:
        return f"read{self.tokens}"


def read_arguments(
    slots: np.ndarray, shift: int | np.ndarray
) -> tuple[ReadShape, tuple[np.ndarray, np.ndarray]]:
    """The program that reads `slots`, keys turned by `shift`, and its arguments."""
    count = len(slots)
    shape = ReadShape(rung(count))
    padded = np.full(shape.tokens, -1, np.int32)
    padded[:count] = slots
    shifts = np.zeros(shape.tokens, np.int32)
    shifts[:count] = shift
    return shape, (padded, shifts)


def read_slots(
    model: Transformer,
    pages: KVPages,
    spec: KVSpec,
    slots: Int[Array, " tokens"],
    shifts: Int[Array, " tokens"],
) -> tuple[Array, Array | None]:
    """Keys, `shifts` positions on, and values: float32 `[layers, tokens, kv_heads, width]`.

    Values are None where a latent is all there is. A slot of -1 gives zeros. Changes nothing.

    Raises:
      ValueError: layers differ in their heads or widths.
    """
    if len({(g.num_kv_heads, g.k_width, g.v_width) for g in spec.groups}) > 1:
        raise ValueError("the layers' KV differs in shape: it cannot be read as one array")
    group = spec.groups[0]
    keys, values = [], []
    for layer, held in enumerate(pages.layers):
        k, v = gather_slots(held, slots, widths=(group.k_width, group.v_width or None))
        cos, sin, offset = model.turn(layer, shifts)
        keys.append(rotate(k.astype(jnp.float32), cos, sin, offset))
        if v is not None:
            values.append(v.astype(jnp.float32))
    return jnp.stack(keys), jnp.stack(values) if values else None
