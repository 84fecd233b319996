"""The partial-recompute forward: stages of a plan, with rows chosen between them on the device.

One program per `StagedShape`; sizes in it are rungs, and rows beyond the real ones are padding.
A row's fresh KV is written before its layer attends, so that chosen rows see each other's.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from kvjax.cache.pages import KVPages, KVSpec, KVView
from kvjax.models import Transformer
from kvjax.pallas_kernels import export_span, gather_slots, import_span
from kvjax.reuse.plan import Spans, Stage, StagedPlan
from kvjax.reuse.scores import Layer, find_score
from kvjax.reuse.windows import group_windows, most_grouped


@dataclasses.dataclass(frozen=True)
class StageShape:
    """What of a stage is compiled in."""

    l0: int
    l1: int
    rows: int  # padded
    chooses: bool  # its rows are chosen by the scores of the stage before
    score: str | None  # what its last layer is scored by, for the stage after
    sums: bool  # scores add up over all its layers
    restores: bool  # rows that the next stage does not choose get their stored KV back
    window: tuple[int, int] | None = None  # how chosen rows are grouped
    enters: bool = False  # rows that the stage before did not run begin from stored hidden states
    keeps: str | None = None  # a score of its last layer that is handed out


@dataclasses.dataclass(frozen=True)
class StagedShape:
    """What of a staged plan is compiled in. Hashable: the key of its program."""

    candidates: int  # padded
    chunks: int  # padded
    stages: tuple[StageShape, ...]
    mask: str
    hidden_size: int = 0  # of stored hidden states; 0: none are given

    def __str__(self) -> str:
        rows = "-".join(str(stage.rows) for stage in self.stages)
        return f"staged{self.candidates}:{rows}"


@register_dataclass
@dataclasses.dataclass(frozen=True)
class StagedBatch:
    """One prompt for the staged forward: C candidates, K chunks, P pages."""

    tokens: Any  # i32[C]
    indices: Any  # i32[C]; -1 is padding
    always: Any  # bool[C]: no stored KV, so it runs in every stage
    blended: Any  # bool[C]: its stored KV is not what a full prefill gives; what stages choose from
    question: Any  # bool[C]
    chunks: Any  # i32[K, 2]: spans of hits that are blended
    block_table: Any  # i32[1, P]
    num_tokens: Any  # i32[]: of the prompt, the last token included
    rows: tuple[Any, ...]  # i32[rows] candidates of each stage that names them; -1 is padding
    counts: Any  # i32[stages]: how many rows a stage chooses
    thresholds: Any  # f32[stages], times the mean score; scores are not negative, 0 is none
    floors: Any  # f32[stages], the same without the mean
    weights: Any  # f32[C]: what a score may weigh candidates by
    hidden: Any = None  # f32[C, hidden]: stored, for the rows that enter mid-stack


def rung(n: int) -> int:
    """The padded size for `n`: four sizes per octave, 32 at least, so that little is padding."""
    step = 32
    while 8 * step < n:
        step *= 2
    return -(-n // step) * step


def shape_of(
    plan: StagedPlan, num_candidates: int, num_always: int, num_chunks: int, hidden_size: int = 0
) -> StagedShape:
    """The program for a plan."""
    shapes = []
    for number, stage in enumerate(plan.stages):
        after = plan.stages[number + 1] if number + 1 < len(plan.stages) else None
        choice = after.rows if after is not None and not isinstance(after.rows, Spans) else None
        shapes.append(
            StageShape(
                l0=stage.l0,
                l1=stage.l1,
                rows=rung(_num_rows(stage, num_candidates, num_always)),
                chooses=not isinstance(stage.rows, Spans),
                score=None if choice is None else choice.score,
                sums=choice is not None and choice.layers == "sum",
                restores=choice is not None and stage.update == "chosen",
                keeps=None if choice is None else choice.keeps,
                window=None if isinstance(stage.rows, Spans) else stage.rows.window,
                enters=stage.hidden is not None,
            )
        )
    chunks = 1 << max(0, (num_chunks - 1).bit_length())
    return StagedShape(rung(num_candidates), chunks, tuple(shapes), plan.mask, hidden_size)


def _num_rows(stage: Stage, num_candidates: int, num_always: int) -> int:
    if isinstance(stage.rows, Spans):
        return max(1, stage.rows.num_rows)
    k, window = stage.rows.k, stage.rows.window
    most = k if window is None else most_grouped(k, *window)
    return max(1, min(num_candidates, most + num_always))


def run_staged(
    model: Transformer, pages: KVPages, spec: KVSpec, shape: StagedShape, batch: StagedBatch
) -> tuple[KVPages, tuple[Array, ...], tuple[Array, ...]]:
    """Runs all stages; the indices of each stage's rows (-1 is padding), and the scores that stages
    keep. Consumes `pages`."""
    kept_scores: list[Array] = []
    scores = jnp.zeros(shape.candidates, jnp.float32)
    hidden = place = ids = None
    stored: list[tuple[int, Any, Array]] = []
    chosen = []
    for number, stage in enumerate(shape.stages):
        fresh = number == 0 or stage.l0 <= shape.stages[number - 1].l0
        previous = ids
        if stage.chooses:
            eligible = batch.indices >= 0
            if not fresh:
                eligible &= _members(previous, shape.candidates)
            ids = _choose(scores, eligible, batch, number, stage)
        else:
            ids = batch.rows[number]
        for layer, span, slots in stored:  # rows of the stage before that were not chosen
            back = jnp.where(_members(ids, shape.candidates)[jnp.maximum(previous, 0)], -1, slots)
            restored = import_span(pages.layers[layer], span, back)
            pages = _with_layer(pages, layer, restored)
        stored = []
        if fresh or hidden is None or place is None:
            hidden = model.embed(batch.tokens[jnp.maximum(ids, 0)])
        else:
            hidden = hidden[place[jnp.maximum(ids, 0)]]
        if stage.enters:
            ran, at = jnp.zeros(shape.candidates, bool), jnp.maximum(ids, 0)
            if not fresh:
                ran = _members(previous, shape.candidates)
            hidden = jnp.where(ran[at][:, None], hidden, batch.hidden[at])
        indices = jnp.where(ids < 0, -1, batch.indices[jnp.maximum(ids, 0)])
        views = _views(spec, shape, batch, indices, stage.chooses)
        rows = _Rows(ids, jnp.maximum(indices, 0), views, jnp.array([0, stage.rows], jnp.int32))
        hidden, pages, scores, stored, kept = _run_stage(
            model, pages, spec, stage, batch, rows, hidden
        )
        kept_scores += kept
        place = _inverse(ids, shape.candidates)
        chosen.append(indices)
    return pages, tuple(chosen), tuple(kept_scores)


@dataclasses.dataclass(frozen=True)
class _Rows:
    ids: Array
    positions: Array
    views: tuple[KVView, ...]
    query_starts: Array


def _run_stage(model, pages, spec, stage: StageShape, batch: StagedBatch, rows: _Rows, hidden):
    """A stage's layers, and the scores that the next stage chooses by."""
    scores = jnp.zeros(batch.indices.shape[0], jnp.float32)
    stored, kept = [], []
    scored = (
        () if stage.score is None else range(stage.l0 if stage.sums else stage.l1 - 1, stage.l1)
    )
    at = stage.l0
    for layer in scored:
        group = spec.groups[spec.group_of[layer]]
        view = rows.views[spec.group_of[layer]]
        widths = (group.k_width, group.v_width or None)
        hidden, pages, _ = _layers(model, hidden, pages, rows, at, layer)
        entering = hidden
        if stage.restores:
            span = export_span(pages.layers[layer], view.write_slots, widths=widths)
            stored.append((layer, span, view.write_slots))
        old = gather_slots(pages.layers[layer], view.write_slots, widths=widths)
        hidden, pages, _ = _layers(model, hidden, pages, rows, layer, layer + 1)
        new = gather_slots(pages.layers[layer], view.write_slots, widths=widths)
        seen = Layer(
            model, layer, pages.layers[layer], view, entering, rows.positions, rows.ids,
            batch.indices, batch.question, batch.chunks, old, new, batch.weights,
        )  # fmt: skip
        scores += find_score(str(stage.score))(seen)
        if stage.keeps is not None and layer == stage.l1 - 1:
            kept.append(find_score(stage.keeps)(seen))
        at = layer + 1
    hidden, pages, _ = _layers(model, hidden, pages, rows, at, stage.l1)
    return hidden, pages, scores, stored, kept


def _layers(model: Transformer, hidden, pages, rows: _Rows, l0: int, l1: int):
    return model.layers(hidden, pages, rows.positions, rows.query_starts, rows.views, l0=l0, l1=l1)


def _views(spec: KVSpec, shape: StagedShape, batch: StagedBatch, indices, chosen: bool):
    """Where the rows write and what they see, per KV group."""
    size = spec.page_size
    real = indices >= 0
    at = jnp.maximum(indices, 0)
    slots = jnp.where(real, batch.block_table[0][at // size] * size + at % size, -1)
    hi = jnp.where(real, indices + 1, 0)
    if chosen and shape.mask == "bottom_right":  # the last token is one more row, run later
        rank, count = jnp.cumsum(real) - 1, real.sum() + 1
        hi = jnp.where(real, batch.num_tokens - count + rank + 1, 0)
    kv_lens = batch.num_tokens[None]
    return tuple(
        KVView(
            write_slots=slots.astype(jnp.int32),
            visible_lo=(
                jnp.zeros_like(hi) if group.window is None else jnp.maximum(0, hi - group.window)
            ).astype(jnp.int32),
            visible_hi=hi.astype(jnp.int32),
            block_tables=batch.block_table,
            kv_lens=kv_lens,
        )
        for group in spec.groups
    )


def _choose(scores, eligible, batch: StagedBatch, number: int, stage: StageShape) -> Array:
    """Candidates of a stage, ascending: what always runs, and the best of the rest."""
    rest = eligible & batch.blended
    mean = jnp.where(rest, scores, 0).sum() / jnp.maximum(rest.sum(), 1)
    rest &= scores >= jnp.maximum(batch.thresholds[number] * mean, batch.floors[number])
    ranked = jnp.argsort(jnp.where(rest, -scores, jnp.inf), stable=True)
    rank = jnp.zeros_like(ranked).at[ranked].set(jnp.arange(len(ranked)))
    best = rest & (rank < batch.counts[number])
    if stage.window is not None:
        best = group_windows(best, *stage.window) & eligible & batch.blended
    taken = (batch.always & (batch.indices >= 0)) | best
    return jnp.nonzero(taken, size=stage.rows, fill_value=-1)[0].astype(jnp.int32)


def _members(ids, size: int) -> Array:
    """Which candidates are among `ids`."""
    return jnp.zeros(size, bool).at[jnp.where(ids < 0, size, ids)].set(True, mode="drop")


def _inverse(ids, size: int) -> Array:
    """Row of each candidate."""
    at = jnp.where(ids < 0, size, ids)
    rows = jnp.arange(ids.shape[0], dtype=jnp.int32)
    return jnp.zeros(size, jnp.int32).at[at].set(rows, mode="drop")


def _with_layer(pages: KVPages, layer: int, held) -> KVPages:
    layers = list(pages.layers)
    layers[layer] = held
    return KVPages(tuple(layers))
