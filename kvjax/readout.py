"""What a parked sequence knows, as numbers: logits behind its tokens, and its keys and values.

For judging KV, not for serving: programs compile at first use, and every call waits for the device.
Only the thread that owns the engine may call this.
"""

import dataclasses
from collections.abc import Sequence as Seq

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kvjax.cache.pages import KVPages, KVSpec, KVView
from kvjax.models import Transformer
from kvjax.pallas_kernels import gather_slots


@dataclasses.dataclass(frozen=True)
class ScoreShape:
    """Rows of one scoring program, the padded ones included."""

    rows: int

    def __str__(self) -> str:
        return f"score{self.rows}"


@dataclasses.dataclass(frozen=True)
class ReadShape:
    """Slots that one reading program gathers in every layer."""

    slots: int

    def __str__(self) -> str:
        return f"read{self.slots}"


def padded(count: int) -> int:
    """The next power of two, 16 at least."""
    return max(16, 1 << (count - 1).bit_length())


def run_rows(
    model: Transformer,
    pages: KVPages,
    spec: KVSpec,
    tokens: Int[Array, " rows"],
    first: Int[Array, ""],
    count: Int[Array, ""],
    block_table: Int[Array, "1 pages"],
) -> tuple[KVPages, Array]:
    """Runs `count` tokens of one sequence from index `first` on over the KV before them.

    Writes their KV into the sequence's own pages. Returns the pages and logits f32[rows, vocab];
    rows from `count` on are padding. Consumes `pages`.
    """
    row = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    real = row < count
    index = jnp.where(real, first + row, 0)
    slots = block_table[0][index // spec.page_size] * spec.page_size + index % spec.page_size
    hi = jnp.where(real, index + 1, 0)
    views = tuple(
        KVView(
            write_slots=jnp.where(real, slots, -1),
            visible_lo=jnp.maximum(0, hi - group.window) if group.window else jnp.zeros_like(hi),
            visible_hi=hi,
            block_tables=block_table,
            kv_lens=(first + count)[None],
        )
        for group in spec.groups
    )
    starts = jnp.stack([jnp.zeros_like(count), count])
    hidden, pages, _ = model.layers(model.embed(tokens), pages, index, starts, views)
    return pages, model.head(hidden)


def read_slots(
    pages: KVPages, spec: KVSpec, slots: Int[Array, " slots"]
) -> tuple[tuple[Array, Array | None], ...]:
    """Keys and values of `slots`, one pair per layer, f32[slots, kv_heads, width]; latent layers
    have no values of their own. Slots of -1 are padding."""
    found = []
    for layer, held in enumerate(pages.layers):
        group = spec.groups[spec.group_of[layer]]
        k, v = gather_slots(held, slots, widths=(group.k_width, group.v_width or None))
        found.append((k.astype(jnp.float32), None if v is None else v.astype(jnp.float32)))
    return tuple(found)


@dataclasses.dataclass(frozen=True, slots=True)
class LayerKV:
    """Keys and values of one layer, f32[tokens, kv_heads, width]; `v` is None for latent ones."""

    k: np.ndarray
    v: np.ndarray | None


def as_layers(found: Seq[tuple[jax.Array, jax.Array | None]], count: int) -> tuple[LayerKV, ...]:
    """What `read_slots` gave for `count` slots, on the host and without the padding."""
    return tuple(
        LayerKV(np.asarray(k)[:count], None if v is None else np.asarray(v)[:count])
        for k, v in found
    )
