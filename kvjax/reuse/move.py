"""Chunk KV into a request's own slots: gather, patch, turn, write, in every layer.

The canonical copy is read and never written; what arrives is one rotation away from it.
"""

from typing import NamedTuple

import jax
from jaxtyping import Array, Int

from kvjax.cache.pages import KVPages
from kvjax.models import Transformer
from kvjax.pallas_kernels import LowRank, reposition


class DevicePatch(NamedTuple):
    """A `KVPatch` on the device, layer by layer along the first axis; padded tokens are zero."""

    k: Array
    v: Array | None
    k_left: Array | None
    v_left: Array | None


def move_chunks(
    model: Transformer,
    pages: KVPages,
    src_slots: Int[Array, " tokens"],
    dst_slots: Int[Array, " tokens"],
    shifts: Int[Array, " tokens"],
    patch: DevicePatch | None = None,
    frame: str = "source",
) -> KVPages:
    """Moves tokens' KV to other slots and `shifts` positions on. A destination of -1 is padding.

    Consumes `pages`. Over a mesh XLA moves them: it can split a gather, and no kernel.
    """
    layers, backend = [], None if model.sharding.mesh is None else "xla"
    for layer, held in enumerate(pages.layers):
        cos, sin, offset = model.turn(layer, shifts)
        patch_k, patch_v = (None, None) if patch is None else _of_layer(patch, layer)
        with jax.named_scope("move_chunks"):
            moved = reposition(
                held, src_slots, dst_slots, cos, sin, patch_k=patch_k, patch_v=patch_v,
                frame="source" if frame == "source" else "target", rotary_offset=offset,
                backend=backend,
            )  # fmt: skip
        layers.append(moved)
    return KVPages(tuple(layers))


def _of_layer(patch: DevicePatch, layer: int):
    """What `reposition` takes, of one layer."""

    def part(right: Array | None, left: Array | None):
        if right is None or left is None:
            return None if right is None else right[layer]
        return LowRank(left[layer], right[layer])

    return part(patch.k, patch.k_left), part(patch.v, patch.v_left)
