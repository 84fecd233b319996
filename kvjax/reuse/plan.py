"""What is computed of a prompt whose KV is partly reused: stages over layers, each with its rows.

A plan is a list of passes. A pass starts from the token embeddings and goes up through the layers
in stages; each runs the rows of the one below, or fewer: a row's hidden state comes from the layer
below, so row sets are nested. Only the last pass has to reach the last layer; those before it are
there for the scores they give.

    CacheBlend          [0, 2) every row            then [2, L) the k best by deviation in layer 1
    FusionRAG           [0, L) the question         again from 0: [0, L) the k best by its attention
    EPIC                [0, L) rows known beforehand: no stages at all, ordinary steps run them
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from kvjax.errors import InvalidPlan


@dataclasses.dataclass(frozen=True, slots=True)
class Spans:
    """Rows known to the host: half-open intervals of indices, ascending and apart."""

    spans: tuple[tuple[int, int], ...]

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return sum(stop - start for start, stop in self.spans)

    @property
    def indices(self) -> np.ndarray:
        """All of them, i32, ascending."""
        return spans_to_indices(self.spans)


@dataclasses.dataclass(frozen=True, slots=True)
class TopK:
    """Rows that the device chooses: the `k` reused tokens that score highest.

    `score` names a row of `kvjax.reuse.scores.SCORES`, evaluated in the last layer of the stage
    before. What is always computed (text without stored KV) stays in and does not count.
    """

    score: str
    k: int
    threshold: float | None = None  # times the mean of the scores: what is below drops out
    floor: float = 0.0  # what is below this score drops out
    layers: Literal["last", "sum"] = "last"  # "sum": added up over the layers of the stage before
    # (size, least): windows of `size` tokens that hold `least` of the k, whole, and nothing else
    window: tuple[int, int] | None = None
    keeps: str | None = None  # another score of the same layer, which decoding goes on with


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """Layers `[l0, l1)` for some rows."""

    l0: int
    l1: int
    rows: Spans | TopK
    # In the stage's last layer, where scores compare old and new KV: whether rows that are not
    # chosen keep what was just computed for them ("all"), or get the stored KV back ("chosen").
    update: Literal["all", "chosen"] = "all"
    # Rows that the stage below does not run begin from hidden states that are stored with their
    # chunk, under this name of `Variant.arrays`.
    hidden: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class StagedPlan:
    """Stages, and where the mask of a row ends."""

    stages: tuple[Stage, ...]
    # "position": a row sees what is before it. "bottom_right": rows are aligned to the end of the
    # keys as in the published CacheBlend code, which lets most rows see the future; it exists to
    # reproduce those numbers only.
    mask: Literal["position", "bottom_right"] = "position"

    @property
    def passes(self) -> tuple[tuple[Stage, ...], ...]:
        """The stages, cut where one starts over."""
        cut: list[list[Stage]] = []
        for stage in self.stages:
            if not cut or stage.l0 <= cut[-1][-1].l0:
                cut.append([])
            cut[-1].append(stage)
        return tuple(map(tuple, cut))


def validate(plan: StagedPlan, num_layers: int, num_tokens: int, always: np.ndarray) -> None:
    """Checks that a plan can be carried out. `always` are the indices that have no stored KV.

    Raises:
      InvalidPlan: layers overlap or leave a gap, a row enters above where its hidden state ends,
        scores are asked for before anything ran, or a row without KV is left out.
    """
    if not plan.stages:
        raise InvalidPlan("a staged plan needs at least one stage")
    passes = plan.passes
    for number, stages in enumerate(passes):
        _validate_pass(stages, number, num_layers, num_tokens, always)
    last = passes[-1]
    if last[-1].l1 != num_layers:
        raise InvalidPlan(f"the last pass ends at layer {last[-1].l1} of {num_layers}")
    for stage in last:
        if isinstance(stage.rows, Spans) and len(always):
            left_out = np.setdiff1d(always, stage.rows.indices)
            if len(left_out):
                raise InvalidPlan(
                    f"stage [{stage.l0}, {stage.l1}) leaves out row {left_out[0]}, which has no "
                    "stored KV"
                )


def _validate_pass(
    stages: Sequence[Stage], number: int, num_layers: int, num_tokens: int, always: np.ndarray
) -> None:
    below: Stage | None = None
    for stage in stages:
        name = f"stage [{stage.l0}, {stage.l1})"
        if not 0 <= stage.l0 < stage.l1 <= num_layers:
            raise InvalidPlan(f"{name} does not lie within {num_layers} layers")
        expected = stage.l0 if below is None else below.l1
        if below is None and stage.l0 and stage.hidden is None:
            raise InvalidPlan(f"{name} starts above the embeddings without hidden states")
        if stage.l0 != expected:
            raise InvalidPlan(f"{name} must start at layer {expected}, where the one below ends")
        if isinstance(stage.rows, TopK):
            if stage.rows.k < 0:
                raise InvalidPlan(f"{name} chooses k={stage.rows.k} rows; k must not be negative")
            if below is None and number == 0:
                raise InvalidPlan(f"{name} chooses rows, but nothing has run that could score them")
        else:
            _validate_spans(stage.rows, name, num_tokens)
            if below is not None and stage.hidden is None:
                sure = always if isinstance(below.rows, TopK) else below.rows.indices
                extra = np.setdiff1d(stage.rows.indices, sure)
                if len(extra):
                    raise InvalidPlan(
                        f"{name} has row {extra[0]}, which the stage below does not surely "
                        "compute: row sets must be nested"
                    )
        below = stage


def _validate_spans(rows: Spans, name: str, num_tokens: int) -> None:
    end = 0
    for start, stop in rows.spans:
        if not end <= start < stop <= num_tokens:
            raise InvalidPlan(
                f"{name} has span [{start}, {stop}); spans ascend, are not empty and end by "
                f"{num_tokens}"
            )
        end = stop


def spans_to_indices(spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Every index of half-open intervals, i32, in their order."""
    if not spans:
        return np.zeros(0, np.int32)
    return np.concatenate([np.arange(a, b, dtype=np.int32) for a, b in spans])


def indices_to_spans(indices: np.ndarray | Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Half-open intervals of ascending, distinct indices."""
    array = np.asarray(indices, np.int64)
    if not len(array):
        return ()
    breaks = np.flatnonzero(np.diff(array) != 1)
    starts, stops = array[np.r_[0, breaks + 1]], array[np.r_[breaks, len(array) - 1]] + 1
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))


def rest_of(spans: Sequence[tuple[int, int]], start: int, stop: int) -> tuple[tuple[int, int], ...]:
    """What of `[start, stop)` the ascending intervals do not cover."""
    rest, at = [], start
    for a, b in spans:
        if a > at:
            rest.append((at, min(a, stop)))
        at = max(at, b)
    if at < stop:
        rest.append((at, stop))
    return tuple((a, b) for a, b in rest if a < b)
