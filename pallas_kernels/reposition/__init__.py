"""Moving stored KV to other slots and other rotary positions, with corrections on the way.

Rotation by a difference of positions: RoFormer (arXiv 2104.09864, section 3.2.2), where
`R(a) R(b) = R(a + b)`. A patch adds what the tokens would have learnt from a context that they
were not computed in.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.pallas_kernels.dispatch import Operation, later
from kvjax.pallas_kernels.page_ops import LayerPages, Pages
from kvjax.pallas_kernels.page_ops.arguments import check_ids, check_moves
from kvjax.pallas_kernels.reposition import cpu, reference, xla
from kvjax.pallas_kernels.reposition.patches import LowRank, Patch

__all__ = ["LowRank", "Patch", "reposition", "rotary_shift", "rotary_tables"]

_move = Operation(
    "reposition",
    {"cpu": ("cpu", "xla"), "*": ("xla",)},
    {"cpu": cpu.reposition, "xla": xla.reposition, "reference": reference.reposition},
    {"reference": "float64 numpy on the host, the specification: only by name, outside jit"},
    {"cpu": cpu.probe},
)
_move.register(
    "gpu", later("kvjax.pallas_kernels.reposition.gpu", "reposition"), platforms=("gpu",)
)
_move.probes["gpu"] = later("kvjax.pallas_kernels.hopper", "probe_copies")
_move.register(
    "tpu", later("kvjax.pallas_kernels.reposition.tpu", "reposition"), platforms=("tpu",)
)
_move.probes["tpu"] = later("kvjax.pallas_kernels.compat", "probe_tpu")


def reposition(
    pages: Pages,
    src_slots: Int[Array, " tokens"],
    dst_slots: Int[Array, " tokens"],
    cos: Float[Array, "tokens half"],
    sin: Float[Array, "tokens half"],
    *,
    patch_k: Patch | None = None,
    patch_v: Patch | None = None,
    frame: Literal["source", "target"] = "source",
    rotary_offset: int = 0,
    checks: bool = False,
    backend: str | None = None,
) -> Pages:
    """Moves the KV of tokens to other slots, its keys rotated by a difference of positions.

    All sources are read before any destination is written, so runs may overlap. A pair with a
    destination of -1 is padding and is dropped; no two destinations are equal. A slot that is no
    destination keeps every bit. Consumes `pages`.

    With `R` the rotation, `k` the stored key and `p` its patch, the new key is `R (k + p)` in the
    source frame (a patch made for the stored positions) or `R k + p` in the target frame. The new
    value is `v + patch_v`; without a patch its bits are copied. Arithmetic is float32; what comes
    out is rounded to what the pages hold, int8 and float8 with a new scale. Rounding adds up over
    moves, so move from the canonical copy, once.

    Args:
      cos, sin: of the angle `(new - old position) * frequency` of each channel pair, from float64
        (`rotary_tables`). Channels `rotary_offset + i` and `rotary_offset + half + i` are a pair.
      patch_k, patch_v: dense `[tokens, kv_heads, width]` or `LowRank`.
      rotary_offset: the first rotated channel; the others pass. 0 for a full rotation and for a
        partial one of the leading channels, the width of the latent for latent (MLA) pages.

      checks: also check slots that are being traced; see `kvjax.pallas_kernels.checked`.

    Raises:
      ValueError: shapes that do not fit each other, an unknown frame, a patch of values for pages
        that hold none; slots out of range or two equal destinations, where values are at hand.
    """
    if dst_slots.shape != src_slots.shape:
        raise ValueError(
            f"expected as many sources as destinations, got {src_slots.shape=} {dst_slots.shape=}"
        )
    _check(pages, src_slots, cos, sin, patch_k, patch_v, rotary_offset)
    if frame not in ("source", "target"):
        raise ValueError(f"frame must be 'source' or 'target', got {frame!r}")
    num_slots = pages.num_pages * pages.page_size
    src_slots, dst_slots = check_moves(num_slots, src_slots, dst_slots, "slots", checks)
    with jax.named_scope("reposition"):
        return _move(
            pages, src_slots, dst_slots, cos, sin, patch_k=patch_k, patch_v=patch_v, frame=frame,
            rotary_offset=rotary_offset, backend=backend,
        )  # fmt: skip


def rotary_shift(
    pages: Pages,
    slots: Int[Array, " tokens"],
    cos: Float[Array, "tokens half"],
    sin: Float[Array, "tokens half"],
    *,
    rotary_offset: int = 0,
    checks: bool = False,
    backend: str | None = None,
) -> Pages:
    """Rotates the keys at `slots` where they are; values are not touched. Consumes `pages`.

    `reposition` with destinations equal to sources. A slot of -1 is padding. Raises as it does.
    """
    _check(pages, slots, cos, sin, None, None, rotary_offset)
    last = pages.num_pages * pages.page_size - 1
    slots = check_ids("slots", slots, last, checks, distinct=True)
    with jax.named_scope("rotary_shift"):
        return _move(
            pages, slots, None, cos, sin, patch_k=None, patch_v=None, frame="source",
            rotary_offset=rotary_offset, backend=backend,
        )  # fmt: skip


def rotary_tables(
    shifts: Sequence[int] | np.ndarray, inverse_frequencies: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of `shift * frequency`, `[tokens, half]`, computed in float64, as float32.

    `shifts` are new minus old positions. Frequencies are those of the model after any scaling
    (linear, llama3, YaRN); the amplitude that YaRN puts on its tables is already in the stored
    keys and is not applied again.
    """
    angles = np.asarray(shifts, np.float64)[:, None] * np.asarray(inverse_frequencies, np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _check(pages: Pages, slots, cos, sin, patch_k, patch_v, rotary_offset: int) -> None:
    if len(slots.shape) != 1 or cos.shape[:1] != slots.shape or cos.ndim != 2:
        raise ValueError(f"expected cos[tokens, half] for {slots.shape=}, got {cos.shape=}")
    if sin.shape != cos.shape:
        raise ValueError(f"cos and sin differ: {cos.shape=} {sin.shape=}")
    split = isinstance(pages, LayerPages)
    k_lanes = (pages.k if split else pages.kv).shape[3]
    if rotary_offset < 0 or rotary_offset + 2 * cos.shape[1] > k_lanes:
        raise ValueError(
            f"{rotary_offset=} and 2 * {cos.shape[1]} channels exceed keys of {k_lanes}"
        )
    if patch_v is not None and split and pages.v is None:
        raise ValueError("patch_v given, but the pages hold no values (latent)")
    half = k_lanes if patch_v is None else k_lanes // 2  # lanes, of packed pages
    for name, patch, held in (
        ("patch_k", patch_k, pages.k if split else None),
        ("patch_v", patch_v, pages.v if split else None),
    ):
        if patch is None:
            continue
        width = half if held is None else held.shape[3]
        fits = patch.shape[2] == width if split else patch.shape[2] <= width
        if len(patch.shape) != 3 or patch.shape[:2] != (*slots.shape, pages.kv_heads) or not fits:
            raise ValueError(
                f"{name} must be [{slots.shape[0]}, {pages.kv_heads}, {width}], got {patch.shape}"
            )
