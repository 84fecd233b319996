"""Hidden states in place of KV: read off a sequence whose KV is there, and turned into KV again.

What enters a layer gives its keys and values by a norm, a product and a rotation: a part of what a
forward computes, without attention and MLP.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache.pages import KVPages, KVSpec
from kvjax.models import Transformer
from kvjax.pallas_kernels import write_slots
from kvjax.readout import row_views

HIDDEN = "hidden"  # of `Variant.arrays`: [layers, tokens, hidden], what enters each layer


@dataclasses.dataclass(frozen=True)
class CaptureShape:
    """One capturing program: its rows, the padded ones included, and which layers' input."""

    rows: int
    layers: tuple[int, ...]  # ascending
    dtype: str

    def __str__(self) -> str:
        return f"capture{self.rows}:{self.layers[0]}-{self.layers[-1]}"


@dataclasses.dataclass(frozen=True)
class RestoreShape:
    """The shapes of one restoring program."""

    tokens: int
    hidden_size: int
    dtype: str

    def __str__(self) -> str:
        return f"restore{self.tokens}"


def entering_name(layer: int) -> str:
    """Under which `Variant.arrays` hold what enters one layer: `[tokens, hidden]`."""
    return f"entering:{layer}"


def hidden_dtype(spec: KVSpec) -> str:
    """What hidden states are kept as: float32 beside float32 KV, else bfloat16."""
    return "float32" if all(g.dtype == "float32" for g in spec.groups) else "bfloat16"


def capture(
    model: Transformer,
    pages: KVPages,
    spec: KVSpec,
    layers: tuple[int, ...],
    dtype: str,
    tokens: Int[Array, " rows"],
    first: Int[Array, ""],
    count: Int[Array, ""],
    block_table: Int[Array, "1 pages"],
) -> tuple[KVPages, Float[Array, "layers rows hidden"]]:
    """What enters each of `layers` (ascending) at `count` tokens of one sequence, from index
    `first` on, whose KV is in its pages. Runs the layers below the last of them, and writes
    nothing. Consumes `pages`."""
    index, starts, views = row_views(spec, tokens.shape[0], first, count, block_table, write=False)
    *below, last = layers
    hidden, pages, kept = model.layers(
        model.embed(tokens), pages, index, starts, views, l1=last, collect=below
    )
    return pages, jnp.stack([entering.astype(dtype) for entering in (*kept, hidden)])


def restore(
    model: Transformer,
    pages: KVPages,
    hidden: Float[Array, "layers tokens hidden"],
    slots: Int[Array, " tokens"],
    positions: Int[Array, " tokens"],
) -> KVPages:
    """Writes the KV of tokens at `positions` to `slots`; -1 is padding. Consumes `pages`."""
    layers = []
    for layer, held in enumerate(pages.layers):
        with jax.named_scope("restore"):
            _, k, v = model.project(layer, hidden[layer].astype(jnp.float32), positions)
            layers.append(write_slots(held, k, v, slots))
    return KVPages(tuple(layers))
