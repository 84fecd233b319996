"""What selectors rank reused tokens by, computed on the device between two stages.

A score sees one layer: the KV that was stored for the rows of the stage, the KV that the stage has
just computed for them, and the attention that they pay. It gives one number per candidate; those of
candidates that the stage did not run are not looked at, unless the score is about keys.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.pages import KVView
from kvjax.models import Transformer
from kvjax.pallas_kernels import AttentionMass, Pages, attention_mass, paged_attention


def mass_of_rows(
    model: Transformer,
    layer: int,
    pages: Pages,
    view: KVView,
    hidden: Float[Array, "rows hidden"],
    positions: Int[Array, " rows"],
    segment_starts: Int[Array, "1 segments_plus_1"] | None = None,
    starts: Int[Array, " seqs_plus_1"] | None = None,
) -> AttentionMass:
    """Attention that rows of one sequence (several: `starts`) pay in a layer, summed over heads:
    per key, and per row over the keys of each segment. `hidden` enters the layer."""
    q, _, _ = model.project(layer, hidden, positions)
    c = model.config
    width = c.latent.kv_lora_rank if c.latent else None
    options = {"scale": c.scale, "soft_cap": c.attention_soft_cap, "value_width": width}
    if starts is None:
        starts = jnp.array([0, q.shape[0]], jnp.int32)
    seen = (view.block_tables, starts, view.kv_lens, view.visible_lo, view.visible_hi)
    _, lse = paged_attention(q, pages, *seen, return_lse=True, **options)
    return attention_mass(q, lse, pages, *seen, segment_starts=segment_starts, **options)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a stage, once its rows have been run. R rows among C candidates."""

    model: Transformer
    number: int
    pages: Pages  # as they are now
    view: KVView  # of the rows
    hidden: Float[Array, "rows hidden"]  # entering the layer
    positions: Int[Array, " rows"]
    ids: Int[Array, " rows"]  # candidate of each row, -1 is padding
    indices: Int[Array, " candidates"]  # place of each candidate in the prompt, -1 is padding
    question: Bool[Array, " candidates"]  # text behind the last chunk
    chunks: Int[Array, "chunks 2"]  # spans of the hits, (0, 0) is padding
    old: tuple[Array, Array | None]  # stored KV of the rows, [rows, kv_heads, width]
    new: tuple[Array, Array | None]
    weights: Array | None = None  # f32[candidates], from an earlier stage or step

    def to_candidates(self, rows: Float[Array, " rows"]) -> Float[Array, " candidates"]:
        """One number per row as one per candidate, zero for the others."""
        out = jnp.zeros(self.indices.shape, rows.dtype)
        at = jnp.where(self.ids < 0, self.indices.shape[0], self.ids)
        return out.at[at].set(rows, mode="drop")

    def columns(self, observers: Bool[Array, " rows"], *, within: Array | None = None) -> Array:
        """What each candidate's key is attended to by the rows that observe, summed over heads.

        `within` is a span of indices: softmax over these keys alone; None: over all visible ones.
        """
        lo, hi = self.view.visible_lo, self.view.visible_hi
        if within is not None:
            lo, hi = jnp.maximum(lo, within[0]), jnp.minimum(hi, within[1])
        hi = jnp.where(observers & (self.ids >= 0), hi, 0)
        view = dataclasses.replace(self.view, visible_lo=jnp.minimum(lo, hi), visible_hi=hi)
        mass = mass_of_rows(self.model, self.number, self.pages, view, self.hidden, self.positions)
        at = jnp.where(self.indices < 0, mass.columns.shape[1], self.indices)
        return mass.columns[0].at[at].get(mode="fill", fill_value=0.0)


Score = Callable[[Layer], Array]


def _squared(a: Array, b: Array) -> Array:
    return jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)).sum(axis=(1, 2))


def key_deviation(layer: Layer) -> Array:
    """Squared distance of new and stored keys, both as they are rotated."""
    return layer.to_candidates(_squared(layer.new[0], layer.old[0]))


def value_deviation(layer: Layer) -> Array:
    """Squared distance of new and stored values (of keys where there are no values: latent)."""
    old, new = layer.old[1], layer.new[1]
    if old is None or new is None:
        return key_deviation(layer)
    return layer.to_candidates(_squared(new, old))


def value_angle(layer: Layer) -> Array:
    """1 - cosine between new and stored values, over all heads (keys where there are no values)."""
    old, new = layer.old, layer.new
    pair = (old[0], new[0]) if old[1] is None or new[1] is None else (old[1], new[1])
    a, b = (x.astype(jnp.float32).reshape(x.shape[0], -1) for x in pair)
    norms = jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1)
    cosine = (a * b).sum(axis=1) / jnp.maximum(norms, 1e-30)
    return layer.to_candidates(jnp.maximum(1 - cosine, 0))


def kv_deviation(layer: Layer) -> Array:
    """The sum of both."""
    if layer.old[1] is None:
        return key_deviation(layer)
    return key_deviation(layer) + value_deviation(layer)


def _observing(layer: Layer) -> Array:
    return layer.question[jnp.maximum(layer.ids, 0)]


def question_attention(layer: Layer) -> Array:
    """Attention of the question over all it sees, by key."""
    return layer.columns(_observing(layer))


def question_attention_within(layer: Layer) -> Array:
    """The same, softmax over each chunk by itself (FusionRAG, arXiv 2601.12904, section 4)."""
    observers = _observing(layer)
    each = jax.lax.map(lambda span: layer.columns(observers, within=span), layer.chunks)
    return each.sum(axis=0)


def question_chunk_attention(layer: Layer) -> Array:
    """Attention of the question per key of a chunk, the same for all of its tokens (Cache-Craft,
    arXiv 2502.15734, adaptive early termination)."""
    columns = question_attention(layer)
    starts, stops = layer.chunks[:, 0, None], layer.chunks[:, 1, None]
    within = (layer.indices[None] >= starts) & (layer.indices[None] < stops)
    share = within.astype(columns.dtype)  # [chunks, candidates]
    mean = (share @ columns) / jnp.maximum(share.sum(axis=1), 1)
    return mean @ share


def value_distance(layer: Layer) -> Array:
    """L1 distance of new and stored values (of keys for latent KV)."""
    old, new = (kv[0] if kv[1] is None else kv[1] for kv in (layer.old, layer.new))
    distance = jnp.abs(new.astype(jnp.float32) - old.astype(jnp.float32)).sum(axis=(1, 2))
    return layer.to_candidates(distance)


def attention_value_deviation(layer: Layer) -> Array:
    """Attention that a key gets from all rows, times the L1 distance of its values: KVShare, arXiv
    2503.16525 v2."""
    return layer.columns(layer.ids >= 0) * value_distance(layer)


def observed_value_distance(layer: Layer) -> Array:
    """Attention that a key gets from the question, times the weights that the batch brings."""
    assert layer.weights is not None
    return layer.columns(_observing(layer)) * layer.weights


def deviation_or_influence(
    layer: Layer, deviation: float, influence: float, observers: float
) -> Array:
    """At least 1 for a key that RelayCaching (arXiv 2603.13289) runs again: whose value's angle is
    `deviation` times the mean or more, or to which the last `observers` rows of the question pay
    `influence` times the mean attention or more. Means are over the tokens of chunks."""
    starts, stops = layer.chunks[:, 0, None], layer.chunks[:, 1, None]
    reused = ((layer.indices >= starts) & (layer.indices < stops)).any(axis=0)
    last = jnp.where(layer.question, layer.indices, -1).max() - observers
    watching = layer.question & (layer.indices > last)
    paid = layer.columns(watching[jnp.maximum(layer.ids, 0)])

    def of_mean(scores: Array) -> Array:
        mean = jnp.where(reused, scores, 0).sum() / jnp.maximum(reused.sum(), 1)
        return scores / jnp.maximum(mean, 1e-30)

    return jnp.maximum(of_mean(value_angle(layer)) / deviation, of_mean(paid) / influence)


# By the name that `TopK.score` gives; one from outside is one more entry. Numbers behind a colon
# are further arguments: "deviation_or_influence:1.5,1.45,10".
SCORES: dict[str, Callable[..., Array]] = {
    "key_deviation": key_deviation,
    "value_deviation": value_deviation,
    "kv_deviation": kv_deviation,
    "attention_value_deviation": attention_value_deviation,
    "value_distance": value_distance,
    "observed_value_distance": observed_value_distance,
    "value_angle": value_angle,
    "deviation_or_influence": deviation_or_influence,
    "question_attention": question_attention,
    "question_attention_within": question_attention_within,
    "question_chunk_attention": question_chunk_attention,
}


def find_score(name: str) -> Score:
    """The score of a `TopK`."""
    base, _, numbers = name.partition(":")
    given = [float(number) for number in numbers.split(",")] if numbers else []
    return lambda layer: SCORES[base](layer, *given)
