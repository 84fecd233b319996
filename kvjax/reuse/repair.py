"""Reused tokens run again between the decode steps of a sequence, a few at a time (KVShare).

After a token has been drawn, its attention scores what is still stored KV, times how much the
values of that were found to deviate when the prompt was computed; the best are run again, in place.
Only pages that nobody else uses are written, so a sequence under repair keeps its blended KV to
itself; rows in the page in which an exact prefix ends, which the prefix tree holds, stay as stored.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from kvjax.reuse.forward import StagedBatch, StagedShape, StageShape, rung
from kvjax.reuse.report import Fate, ReuseReport

SCORE = "observed_value_distance"


@dataclasses.dataclass(slots=True, eq=False)
class Repair:
    """What is left to run again in one sequence."""

    rows: np.ndarray  # i32[n], indices of tokens whose KV is still the stored one, ascending
    distance: np.ndarray  # f32[n], L1 distance of their true and stored values
    layer: int  # where the new token's attention is looked at
    per_step: int
    num_layers: int
    seen: int = 0  # tokens computed when the last repair was planned
    eligible: np.ndarray | None = None  # bool[n], decided when the next one is planned

    @property
    def width(self) -> int:
        """Candidates: what may be run again, and the new token."""
        return len(self.rows) + 1

    def due(self, num_computed: int, num_prompt: int) -> bool:
        """Whether a token was computed since, and there is something left to run again."""
        return num_computed > max(self.seen, num_prompt) and len(self.rows) > 0

    def plan(
        self, num_computed: int, page_ids: Sequence[int], page_size: int,
        users: Callable[[int], int],
    ) -> bool:  # fmt: skip
        """Plans the next one; False if every row left lies in pages that others use as well."""
        self.seen = num_computed
        own = np.array([users(page) == 1 for page in page_ids], bool)
        self.eligible = own[self.rows // page_size]
        return bool(self.eligible.any())

    def ran(self, rows: np.ndarray) -> None:
        """Takes off what has been run again; -1 is padding."""
        left = ~np.isin(self.rows, rows)
        self.rows, self.distance, self.eligible = self.rows[left], self.distance[left], None


def repair_after(assembly: Any, report: ReuseReport, distance: np.ndarray) -> Repair:
    """What is left to run again once a staged prefill is done, whose candidates deviate by
    `distance`."""
    ((start, _),) = assembly.reused
    stored = np.isin(report.fates[-1], (Fate.SHIFTED, Fate.PATCHED))
    rows = np.flatnonzero(stored).astype(np.int32)
    layer = assembly.staged.stages[0].l1 - 1
    return Repair(rows, distance[rows - start], layer, assembly.repair, report.num_layers)


class Decoding(Protocol):
    """A sequence under repair."""

    tokens: list[int]
    page_ids: list[int]
    num_computed: int
    repair: Any


def repair_shape(size: int, per_step: int, layer: int, num_layers: int) -> StagedShape:
    """The program for `size` candidates, padded, whose attention in `layer` decides."""
    few = max(4, 1 << (per_step - 1).bit_length())
    looks = StageShape(0, layer + 1, 4, False, SCORE, False, False)
    again = StageShape(0, num_layers, few, True, None, False, False)
    return StagedShape(size, 1, (looks, again), "position")


def stage_repair(
    sequence: Decoding, page_size: int, pages_per_seq: int,
    fit: Callable[[StagedShape], StagedShape] = lambda shape: shape,
) -> tuple[StagedShape, StagedBatch]:  # fmt: skip
    """The program and the arguments of a planned repair. The token that looks is the newest that
    the host knows: the last one may still be on the device."""
    repair: Repair = sequence.repair
    assert repair.eligible is not None
    tokens, page_ids = sequence.tokens, sequence.page_ids
    newest = min(repair.seen, len(tokens)) - 1
    at, k = len(repair.rows), min(repair.per_step, len(repair.rows))
    shape = fit(repair_shape(rung(repair.width), repair.per_step, repair.layer, repair.num_layers))
    size, few = shape.candidates, shape.stages[1].rows

    def padded(values: np.ndarray, last: float, fill: float, dtype: type) -> np.ndarray:
        out = np.full(size, fill, dtype)
        out[:at], out[at] = values, last
        return out

    named, table = np.full(4, -1, np.int32), np.zeros((1, pages_per_seq), np.int32)
    named[0], table[0, : len(page_ids)] = at, page_ids
    ids = np.asarray([tokens[row] for row in repair.rows], np.int32)
    batch = StagedBatch(
        tokens=padded(ids, tokens[newest], 0, np.int32),
        indices=padded(repair.rows, newest, -1, np.int32),
        always=np.zeros(size, bool),
        blended=padded(repair.eligible, False, False, bool),
        question=padded(np.zeros(at), True, False, bool),
        chunks=np.zeros((1, 2), np.int32),
        block_table=table,
        num_tokens=np.int32(newest + 1),
        rows=(named, np.full(few, -1, np.int32)),
        counts=np.asarray([0, k], np.int32),
        thresholds=np.zeros(2, np.float32),
        floors=np.zeros(2, np.float32),
        weights=padded(repair.distance, 0, 0, np.float32),
    )
    return shape, batch
