"""How much attention rows of a prompt paid to each part of it, from KV that is there: P parts.

A second pass over the rows, after they were computed: flash attention kept no probabilities. Hidden
states are made again over the KV in the prompt's pages; none of it is written.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.cache.pages import KVPages, KVSpec
from kvjax.models import Transformer
from kvjax.readout import padded, row_arguments, row_views
from kvjax.reuse.scores import mass_of_rows

PARTS = 32  # of the program that is warmed up: 16 chunks with text in front of each


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
    index, starts, views = row_views(spec, tokens.shape[0], first, count, block_table, write=False)
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
    page_ids: list[int], pages_per_seq: int, rows: int,
) -> tuple[AttendedShape, tuple[np.ndarray, ...]]:  # fmt: skip
    """The program for tokens `[start, stop)` of a prompt, padded to `rows`, and its arguments."""
    parts, size = len(edges) - 1, max(PARTS, padded(len(edges) - 1))
    _, arguments = row_arguments(tokens[start:stop], start, page_ids, pages_per_seq, rows)
    bounds = np.full((1, size + 1), edges[-1], np.int32)
    bounds[0, : parts + 1] = edges
    return AttendedShape(rows, size), (*arguments, bounds)


def empty_attended(shape: AttendedShape, pages_per_seq: int) -> tuple[np.ndarray, ...]:
    """Arguments of the right shapes."""
    number = np.zeros((), np.int32)
    return (
        np.zeros(shape.rows, np.int32), number, number,
        np.zeros((1, pages_per_seq), np.int32), np.zeros((1, shape.parts + 1), np.int32),
    )  # fmt: skip
