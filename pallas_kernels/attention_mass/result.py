"""What `attention_mass` returns."""

from typing import NamedTuple

from jaxtyping import Array, Float


class AttentionMass(NamedTuple):
    """Sums of probabilities over the query heads: divide by their number for the mean head."""

    columns: Float[Array, "seqs keys"]  # per index of each sequence, over its rows
    segments: Float[Array, "tokens segments"] | None  # per row, over the keys of each segment
