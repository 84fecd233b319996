"""Stored KV as numbers, for strategies that work something out from it."""

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.cache.pages import KVPages, KVSpec
from kvjax.models import Transformer
from kvjax.pallas_kernels import gather_slots
from kvjax.pallas_kernels.reposition.rotation import rotate

_RUNGS = (128, 512)  # tokens of a program


@dataclasses.dataclass(frozen=True)
class ReadShape:
    """The shapes of one program."""

    tokens: int

    def __str__(self) -> str:
        return f"read{self.tokens}"


def read_slots(
    model: Transformer,
    pages: KVPages,
    spec: KVSpec,
    slots: Int[Array, " tokens"],
    shifts: Int[Array, " tokens"],
) -> tuple[
    Float[Array, "layers tokens heads k_width"], Float[Array, "layers tokens heads v_width"] | None
]:
    """Tokens' KV as float32, keys turned by `shifts` positions. A slot of -1 gives zeros."""
    keys, values = [], []
    for layer, held in enumerate(pages.layers):
        group = spec.groups[spec.group_of[layer]]
        k, v = gather_slots(held, slots, widths=(group.k_width, group.v_width or None))
        keys.append(rotate(k.astype(jnp.float32), *model.turn(layer, shifts)))
        values.append(None if v is None else v.astype(jnp.float32))
    return jnp.stack(keys), None if values[0] is None else jnp.stack(values)


def read_parts(
    slots: np.ndarray, shifts: np.ndarray
) -> Iterator[tuple[ReadShape, int, np.ndarray, np.ndarray]]:
    """Calls that read `slots`: the program, how many tokens are real, and padded arguments."""
    most = _RUNGS[-1]
    for first in range(0, len(slots), most):
        part, turn = (x[first : first + most].astype(np.int32) for x in (slots, shifts))
        size, count = next(r for r in _RUNGS if r >= len(part)), len(part)
        rest = (0, size - count)
        yield ReadShape(size), count, np.pad(part, rest, constant_values=-1), np.pad(turn, rest)
