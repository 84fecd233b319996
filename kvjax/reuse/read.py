"""Stored KV as numbers: gathered, dequantised, keys turned to where a strategy wants them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kvjax.cache.pages import KVPages, KVSpec
from kvjax.models import Transformer
from kvjax.pallas_kernels import gather_slots
from kvjax.pallas_kernels.reposition.rotation import rotate
from kvjax.reuse.padding import padded_slots, pieces


@dataclasses.dataclass(frozen=True)
class ReadShape:
    """The shape of one read program."""

    tokens: int

    def __str__(self) -> str:
        return f"read{self.tokens}"


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


def read_pieces(
    call: Callable[..., Any], slots: np.ndarray, shift: int | np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """`read_slots` of any number of slots, in numpy: `call(shape, slots, shifts)` runs a program.

    `shift` is of all, or of each.
    """
    shifts = np.broadcast_to(np.asarray(shift, np.int32), slots.shape)
    keys, values = [], []
    for part, size in pieces(len(slots)):
        count = part.stop - part.start
        turn = np.pad(shifts[part], (0, size - count))
        k, v = call(ReadShape(size), padded_slots(slots[part], size), turn)
        keys.append(np.asarray(k)[:, :count])
        values.append(None if v is None else np.asarray(v)[:, :count])
    k = np.concatenate(keys, axis=1)
    return k, None if values[0] is None else np.concatenate(values, axis=1)
