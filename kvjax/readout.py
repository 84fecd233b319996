"""What a parked sequence knows, as numbers: logits behind its tokens, and its keys and values.

For judging KV, not for serving: programs compile at first use, and every call waits for the device.
Only the thread that owns the engine may call this.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kvjax.cache.pages import KVPages, KVSpec, KVView
from kvjax.models import Transformer


@dataclasses.dataclass(frozen=True)
class ScoreShape:
    """Rows of one scoring program, the padded ones included."""

    rows: int

    def __str__(self) -> str:
        return f"score{self.rows}"


def padded(count: int) -> int:
    """The next power of two, 16 at least."""
    return max(16, 1 << (count - 1).bit_length())


def row_arguments(
    tokens: Sequence[int], first: int, page_ids: Sequence[int], pages_per_seq: int,
    rows: int | None = None,
) -> tuple[int, tuple[np.ndarray, ...]]:  # fmt: skip
    """Padded rows (`rows`, or the next power of two), and the arguments `tokens`, `first`, `count`,
    `block_table` of a program over some tokens of one sequence."""
    rows = padded(len(tokens)) if rows is None else rows
    ids, table = np.zeros(rows, np.int32), np.zeros((1, pages_per_seq), np.int32)
    ids[: len(tokens)], table[0, : len(page_ids)] = tokens, page_ids
    return rows, (ids, np.int32(first), np.int32(len(tokens)), table)  # type: ignore[return-value]


def row_views(
    spec: KVSpec, rows: int, first: Array, count: Array, block_table: Array, *, write: bool
) -> tuple[Array, Array, tuple[KVView, ...]]:
    """Indices, query starts and views of `count` tokens of one sequence from index `first` on.

    Rows from `count` on are padding; with `write=False` no row writes its KV.
    """
    row = jnp.arange(rows, dtype=jnp.int32)
    real = row < count
    index = jnp.where(real, first + row, 0)
    slots = block_table[0][index // spec.page_size] * spec.page_size + index % spec.page_size
    hi = jnp.where(real, index + 1, 0)
    views = tuple(
        KVView(
            write_slots=jnp.where(real & write, slots, -1),
            visible_lo=jnp.maximum(0, hi - group.window) if group.window else jnp.zeros_like(hi),
            visible_hi=hi,
            block_tables=block_table,
            kv_lens=(first + count)[None],
        )
        for group in spec.groups
    )
    return index, jnp.stack([jnp.zeros_like(count), count]), views


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
    index, starts, views = row_views(spec, tokens.shape[0], first, count, block_table, write=True)
    hidden, pages, _ = model.layers(model.embed(tokens), pages, index, starts, views)
    return pages, model.head(hidden)


@dataclasses.dataclass(frozen=True, slots=True)
class LayerKV:
    """Keys and values of one layer, f32[tokens, kv_heads, width]; `v` is None for latent ones."""

    k: np.ndarray
    v: np.ndarray | None
