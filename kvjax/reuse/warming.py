"""The programs that a strategy needs, known before any prompt, so that warm-up can compile them.

A staged prefill fits its prompt: its length, how much of it is text, how many chunks it has. After
warm-up a prompt runs in the smallest program of a coarse ladder that holds it instead.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from kvjax.cache.chunks import Variant, VariantKey, tokens_hash
from kvjax.errors import KVJaxError
from kvjax.reuse.forward import StagedShape, rung, shape_of
from kvjax.reuse.pack import MoveShape
from kvjax.reuse.pieces import PIECE_SIZES
from kvjax.reuse.plan import StagedPlan
from kvjax.reuse.read import ReadShape
from kvjax.reuse.strategy import Hit, ModelFacts, Prompt, Segment, Strategy

_SMALLEST = 128  # tokens of the smallest staged program of a ladder
_CHUNKS = 16  # that its programs hold; a prompt with more has one of its own
_TEXT = (8, 2)  # a program holds prompts whose text is up to one in so many tokens

Shape = MoveShape | ReadShape | StagedShape


def reuse_programs(strategy: Strategy, facts: ModelFacts, max_model_len: int) -> tuple[Shape, ...]:
    """Shapes of the programs that serve any prompt of up to `_CHUNKS` chunks by `strategy`."""
    if type(strategy).look_up is Strategy.look_up:  # it never reuses a chunk
        return ()
    shapes: dict[Shape, None] = {}
    for size in PIECE_SIZES:
        shapes[MoveShape(size)] = shapes[ReadShape(size)] = None
        for rank, frame in strategy.patch_shapes:
            shapes[MoveShape(size, rank, frame)] = None
    for size in _sizes(max_model_len - 2):  # the last token, and one to draw
        shapes.update(dict.fromkeys(_staged(strategy, facts, size)))
    return tuple(shapes)


def smallest_holding(shapes: Iterable[object], wanted: StagedShape) -> StagedShape | None:
    """The program that computes least among those which can run what `wanted` was made for."""
    fits = [s for s in shapes if isinstance(s, StagedShape) and _holds(s, wanted)]
    return min(fits, key=_cost, default=None)


def _holds(shape: StagedShape, wanted: StagedShape) -> bool:
    return (
        _unsized(shape) == _unsized(wanted)
        and shape.candidates >= wanted.candidates
        and shape.chunks >= wanted.chunks
        and all(a.rows >= b.rows for a, b in zip(shape.stages, wanted.stages, strict=True))
    )


def _unsized(shape: StagedShape) -> StagedShape:
    stages = tuple(dataclasses.replace(stage, rows=0) for stage in shape.stages)
    return dataclasses.replace(shape, candidates=0, chunks=0, stages=stages)


def _cost(shape: StagedShape) -> tuple[int, int]:
    return sum((s.l1 - s.l0) * s.rows for s in shape.stages), shape.candidates


def _sizes(most: int) -> Iterator[int]:
    """Doubling, and the last is enough for the longest prompt."""
    size = _SMALLEST
    while size < most:
        yield size
        size *= 2
    yield rung(most)


def _staged(strategy: Strategy, facts: ModelFacts, size: int) -> Iterator[StagedShape]:
    """Programs for `size` candidates: with little text, with much, and one that holds any."""
    for question_last in (True, False):  # strategies plan otherwise where no text is behind chunks
        for share in _TEXT:
            text = min(-(-size // share), size - 1)
            shape = _shape(strategy, facts, size, text, question_last)
            if shape is None:
                continue
            yield shape
            stages = tuple(dataclasses.replace(stage, rows=size) for stage in shape.stages)
            yield dataclasses.replace(shape, stages=stages)


def _shape(
    strategy: Strategy, facts: ModelFacts, size: int, text: int, question_last: bool
) -> StagedShape | None:
    """The program for a made-up prompt of `size + 1` tokens with one chunk, `text` around it."""
    tokens = tuple([1] * (size + 1))
    start, stop = (0, size - text) if question_last else (text, size)
    chunk = tokens[start:stop]
    name = tokens_hash(chunk)
    segment = Segment(start, stop, name)
    variant = Variant(VariantKey(None, name, ""), np.asarray(chunk), 0, [], 0)
    prompt = Prompt(tokens, (segment,), None, facts)
    try:
        plan = strategy.select(prompt, (Hit(0, segment, variant, start, stop),))
    except (KVJaxError, ValueError, LookupError):  # it wants to know more of a prompt
        return None
    if not isinstance(plan, StagedPlan):
        return None
    return dataclasses.replace(shape_of(plan, size, text, 1), chunks=_CHUNKS)
