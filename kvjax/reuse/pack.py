"""Moves and staged prompts as padded numpy arrays, in the shapes that programs are compiled for."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from kvjax.cache.pages import KVSpec
from kvjax.reuse.assemble import Assembly, Move
from kvjax.reuse.forward import StagedBatch, StagedShape, shape_of
from kvjax.reuse.move import DevicePatch
from kvjax.reuse.padding import LARGE_MOVE, padded_slots, pieces
from kvjax.reuse.plan import Spans, TopK
from kvjax.reuse.restore import HIDDEN, RestoreShape
from kvjax.reuse.strategy import KVPatch


class Placed(Protocol):
    """A sequence: its tokens, and the pages they go to."""

    tokens: list[int]
    page_ids: list[int]
    num_prompt: int
    assembly: Any


@dataclasses.dataclass(frozen=True)
class MoveShape:
    """The shapes of one move program."""

    tokens: int
    patch: tuple[int, ...] | None = None  # () is dense; else the rank; None is none
    frame: str = "source"

    def __str__(self) -> str:
        kind = "" if self.patch is None else "dense" if not self.patch else f"rank{self.patch[0]}"
        return f"move{self.tokens}{kind}"


class PackedMove(NamedTuple):
    """Arguments of one call of a move program."""

    shape: MoveShape | RestoreShape
    arrays: tuple[Any, ...]  # src, dst, shifts, and a patch if the shape has one; or hidden states


def batched_moves(moves: Iterable[tuple[Placed, Move]], page_size: int) -> Iterator[PackedMove]:
    """Calls of move programs that carry out `moves`."""
    plain: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for sequence, move in moves:
        count = move.stop - move.start
        at = np.arange(move.start, move.stop)
        dst = np.asarray(sequence.page_ids, np.int32)[at // page_size] * page_size + at % page_size
        if not move.variant.page_ids:
            yield from _restored(move, dst)
            continue
        src = move.variant.slots(move.offset, move.offset + count, page_size)
        rows = (src, dst.astype(np.int32), np.full(count, move.shift, np.int32))
        if move.patch is None:
            plain.append(rows)
        else:
            for part, size in pieces(count):
                patch = move.patch.part(move.offset + part.start, move.offset + part.stop)
                yield _patched(tuple(column[part] for column in rows), patch, size)
    if plain:
        src, dst, shift = (np.concatenate(column) for column in zip(*plain, strict=True))
        for part, size in pieces(len(src), LARGE_MOVE):
            yield PackedMove(MoveShape(size), _padded(src[part], dst[part], shift[part], size))


def _restored(move: Move, dst: np.ndarray) -> Iterator[PackedMove]:
    """KV of tokens whose hidden states are kept."""
    count = move.stop - move.start
    hidden = move.variant.arrays[HIDDEN][:, move.offset : move.offset + count]
    positions = move.variant.base + move.offset + move.shift + np.arange(count)
    for part, size in pieces(count):
        shape = RestoreShape(size, hidden.shape[2], str(hidden.dtype))
        rest = (0, size - (part.stop - part.start))
        yield PackedMove(
            shape,
            (
                np.pad(hidden[:, part], ((0, 0), rest, (0, 0))),
                padded_slots(dst[part], size),
                np.pad(positions[part].astype(np.int32), rest),
            ),
        )


def _padded(src: np.ndarray, dst: np.ndarray, shift: np.ndarray, size: int) -> tuple[Any, ...]:
    rest = (0, size - len(src))
    return (
        np.pad(src, rest), np.pad(dst, rest, constant_values=-1), np.pad(shift, rest)
    )  # fmt: skip


def _patched(rows: tuple[np.ndarray, ...], patch: KVPatch, size: int) -> PackedMove:
    count = len(rows[0])

    def over_tokens(array: np.ndarray | None) -> np.ndarray | None:
        if array is None:
            return None
        rest = [(0, 0)] * array.ndim
        rest[:2] = (patch.l0, 0), (0, size - count)
        return np.pad(array.astype(np.float32), rest)

    if patch.k_left is None:
        device = DevicePatch(over_tokens(patch.k), over_tokens(patch.v), None, None)  # type: ignore[arg-type]
        shape = MoveShape(size, (), patch.frame)
    else:
        below = ((patch.l0, 0), *((0, 0),) * 3)
        k, v = (
            None if x is None else np.pad(x.astype(np.float32), below) for x in (patch.k, patch.v)
        )
        device = DevicePatch(k, v, over_tokens(patch.k_left), over_tokens(patch.v_left))  # type: ignore[arg-type]
        shape = MoveShape(size, (patch.k_left.shape[2],), patch.frame)
    src, dst, shift = rows
    return PackedMove(shape, (*_padded(src, dst, shift, size), device))


def empty_move(shape: MoveShape, num_layers: int, spec: KVSpec) -> tuple[Any, ...]:
    """Arguments of the right shapes."""
    ints = (np.zeros(shape.tokens, np.int32),) * 3
    if shape.patch is None:
        return ints
    group = spec.groups[0]

    def zeros(*size: int) -> Any:
        return np.zeros((num_layers, *size), np.float32)

    def right(width: int) -> Any:
        if not width:
            return None
        rows = shape.tokens if not shape.patch else shape.patch[0]
        return zeros(rows, group.num_kv_heads, width)

    left = None if not shape.patch else zeros(shape.tokens, shape.patch[0])
    v = right(group.v_width)
    patch = DevicePatch(right(group.k_width), v, left, None if v is None else left)
    return (*ints, patch)


def stage_prompt(
    sequence: Placed,
    page_size: int,
    pages_per_seq: int,
    fit: Callable[[StagedShape], StagedShape] = lambda shape: shape,
) -> tuple[StagedShape, StagedBatch]:
    """The program and the arguments that run a sequence's staged plan.

    `fit` may choose another program that holds what the plan needs.
    """
    assembly: Assembly = sequence.assembly
    plan = assembly.staged
    assert plan is not None
    ((start, stop),) = assembly.reused
    indices = np.arange(start, stop, dtype=np.int32)
    hits = [(m.start, m.stop) for m in assembly.moves if m.start >= assembly.exact_end]
    stored = _entering(plan, assembly, indices)
    width = 0 if stored is None else stored.shape[1]
    shape = fit(shape_of(plan, len(indices), len(assembly.always), len(hits), width))
    size = shape.candidates

    def padded(values: Any, dtype: Any, fill: int = 0) -> np.ndarray:
        out = np.full(size, fill, dtype)
        out[: len(indices)] = values
        return out

    behind = hits[-1][1] if hits else 0
    always = np.isin(indices, assembly.always)
    rows, counts, thresholds, floors = [], [], [], []
    for stage, sized in zip(plan.stages, shape.stages, strict=True):
        named = np.full(sized.rows, -1, np.int32)
        if isinstance(stage.rows, Spans):
            chosen = stage.rows.indices
            named[: len(chosen)] = chosen - start
        rows.append(named)
        top = stage.rows if isinstance(stage.rows, TopK) else None
        counts.append(0 if top is None else top.k)
        thresholds.append(0.0 if top is None or top.threshold is None else top.threshold)
        floors.append(0.0 if top is None else top.floor)
    spans = np.zeros((shape.chunks, 2), np.int32)
    spans[: len(hits)] = np.asarray(hits, np.int32).reshape(-1, 2)
    table = np.zeros((1, pages_per_seq), np.int32)
    table[0, : len(sequence.page_ids)] = sequence.page_ids
    batch = StagedBatch(
        tokens=padded(sequence.tokens[start:stop], np.int32),
        indices=padded(indices, np.int32, -1),
        always=padded(always, bool),
        blended=padded(~always & (indices >= assembly.exact_end), bool),
        question=padded(indices >= behind, bool),
        chunks=spans,
        block_table=table,
        num_tokens=np.int32(sequence.num_prompt),
        rows=tuple(rows),
        counts=np.asarray(counts, np.int32),
        thresholds=np.asarray(thresholds, np.float32),
        floors=np.asarray(floors, np.float32),
        hidden=None if stored is None else np.pad(stored, ((0, size - len(stored)), (0, 0))),
        weights=np.zeros(size, np.float32),
    )
    return shape, batch


def _entering(plan: Any, assembly: Assembly, indices: np.ndarray) -> np.ndarray | None:
    """Stored hidden states f32[len(indices), hidden], zero where no stage asks for any."""
    names = {stage.hidden for stage in plan.stages} - {None}
    if not names:
        return None
    (name,) = names
    out: np.ndarray | None = None
    for move in assembly.moves:
        rows = move.variant.arrays.get(name)
        if rows is None:
            continue
        if out is None:
            out = np.zeros((len(indices), rows.shape[1]), np.float32)
        at, count = move.start - indices[0], move.stop - move.start
        out[at : at + count] = rows[move.offset : move.offset + count]
    assert out is not None, f"no chunk has {name}"
    return out


def empty_batch(shape: StagedShape, pages_per_seq: int) -> StagedBatch:
    """Arguments of the right shapes."""
    size, stages = shape.candidates, shape.stages
    return StagedBatch(
        tokens=np.zeros(size, np.int32),
        indices=np.full(size, -1, np.int32),
        always=np.zeros(size, bool),
        blended=np.zeros(size, bool),
        question=np.zeros(size, bool),
        chunks=np.zeros((shape.chunks, 2), np.int32),
        block_table=np.zeros((1, pages_per_seq), np.int32),
        num_tokens=np.zeros((), np.int32),
        rows=tuple(np.full(stage.rows, -1, np.int32) for stage in stages),
        counts=np.zeros(len(stages), np.int32),
        thresholds=np.zeros(len(stages), np.float32),
        floors=np.zeros(len(stages), np.float32),
        hidden=np.zeros((size, shape.hidden_size), np.float32) if shape.hidden_size else None,
        weights=np.zeros(size, np.float32),
    )


def stage_rows(plan_stages: Sequence[Any], ran: Sequence[Any]) -> list[tuple[int, int, np.ndarray]]:
    """`(l0, l1, indices)` of each stage, once its rows are known."""
    return [(s.l0, s.l1, np.asarray(rows)) for s, rows in zip(plan_stages, ran, strict=True)]
