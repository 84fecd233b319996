"""How much attention rows of a prompt paid to each part of it, from KV that is there: P parts.

A second pass over the rows, after they were computed: flash attention kept no probabilities. Hidden
states are made again over the KV in the prompt's pages; none of it is written.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.cache.pages import KVPages, KVSpec, KVView
from kvjax.models import Transformer
from kvjax.reuse.scores import mass_of_rows


@dataclasses.dataclass(frozen=True)
class AttendedShape:
    """The shape of one program, both padded."""

    rows: int
    parts: int

    def __str__(self) -> str:
        return f"attended{self.rows}x{self.parts}"


def attended(
    model: Transformer,
    pages: KVPages,
    spec: KVSpec,
    tokens: Int[Array, " rows"],
    first: Int[Array, ""],
    count: Int[Array, ""],
    block_table: Int[Array, "1 pages"],
    edges: Int[Array, "1 parts_plus_1"],
) -> tuple[KVPages, Float[Array, "layers rows parts"]]:
    """Attention of tokens `[first, first + count)` of a sequence to indices
    `[edges[p], edges[p + 1])`, in the mean over heads.

    Rows from `count` on are padding, and zero. Consumes `pages`, and gives them back as they were.
    """
    row = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    real = row < count
    index = jnp.where(real, first + row, 0)
    hi = jnp.where(real, index + 1, 0)
    views = tuple(
        KVView(
            write_slots=jnp.full_like(index, -1),
            visible_lo=jnp.maximum(0, hi - group.window) if group.window else jnp.zeros_like(hi),
            visible_hi=hi,
            block_tables=block_table,
            kv_lens=(first + count)[None],
        )
        for group in spec.groups
    )
    starts = jnp.stack([jnp.zeros_like(count), count])
    hidden, sums = model.embed(tokens), []
    for layer in range(model.config.num_layers):
        view = views[spec.group_of[layer]]
        with jax.named_scope("attended"):
            mass = mass_of_rows(model, layer, pages.layers[layer], view, hidden, index, edges)
        assert mass.segments is not None
        sums.append(mass.segments / model.config.num_heads)
        hidden, pages, _ = model.layers(hidden, pages, index, starts, views, l0=layer, l1=layer + 1)
    return pages, jnp.stack(sums)


def attended_arguments(
    tokens: tuple[int, ...], start: int, stop: int, edges: tuple[int, ...],
    page_ids: list[int], pages_per_seq: int,
) -> tuple[AttendedShape, tuple[np.ndarray, ...]]:  # fmt: skip
    """The program for tokens `[start, stop)` of a prompt, and its arguments."""
    parts = len(edges) - 1
    shape = AttendedShape(_padded(stop - start), _padded(parts))
    ids, _, _, table, bounds = empty_attended(shape, pages_per_seq)
    ids[: stop - start] = tokens[start:stop]
    table[0, : len(page_ids)] = page_ids
    bounds[0] = edges[-1]
    bounds[0, : parts + 1] = edges
    return shape, (ids, np.array(start, np.int32), np.array(stop - start, np.int32), table, bounds)


def _padded(count: int) -> int:
    """The next power of two, 16 at least: few programs, for what is seldom run."""
    return max(16, 1 << (count - 1).bit_length())


def empty_attended(shape: AttendedShape, pages_per_seq: int) -> tuple[np.ndarray, ...]:
    """Arguments of the right shapes."""
    number = np.zeros((), np.int32)
    return (
        np.zeros(shape.rows, np.int32), number, number,
        np.zeros((1, pages_per_seq), np.int32), np.zeros((1, shape.parts + 1), np.int32),
    )  # fmt: skip
