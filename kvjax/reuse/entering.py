"""What enters one layer at tokens whose KV is there; kept, it lets a prompt begin mid-stack."""

import dataclasses

from jaxtyping import Array, Float, Int

from kvjax.cache.pages import KVPages, KVSpec
from kvjax.models import Transformer
from kvjax.readout import row_views


@dataclasses.dataclass(frozen=True)
class EnteringShape:
    """One such program; `rows` include padded ones."""

    rows: int
    layer: int

    def __str__(self) -> str:
        return f"entering{self.layer}:{self.rows}"


def entering_name(layer: int) -> str:
    """Under which `Variant.arrays` hold what enters a layer: `[tokens, hidden]`."""
    return f"entering:{layer}"


def entering(
    model: Transformer,
    pages: KVPages,
    spec: KVSpec,
    layer: int,
    tokens: Int[Array, " rows"],
    first: Int[Array, ""],
    count: Int[Array, ""],
    block_table: Int[Array, "1 pages"],
) -> tuple[KVPages, Float[Array, "rows hidden"]]:
    """What enters `layer` at `count` tokens of one sequence from index `first` on, whose KV is in
    its pages. Runs the layers below and writes nothing. Consumes `pages`."""
    index, starts, views = row_views(spec, tokens.shape[0], first, count, block_table, write=False)
    hidden, pages, _ = model.layers(model.embed(tokens), pages, index, starts, views, l1=layer)
    return pages, hidden
