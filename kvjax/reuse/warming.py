"""The programs that a strategy needs, known before any prompt, so that warm-up can compile them.

A staged prefill fits its prompt: its length, how much of it is text, how many chunks it has. After
warm-up a prompt runs in the smallest program of a coarse ladder that holds it instead.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from kvjax.cache.chunks import Variant, VariantKey, tokens_hash
from kvjax.errors import KVJaxError
from kvjax.reuse.attended import PARTS, AttendedShape
from kvjax.reuse.forward import StagedShape, rung, shape_of
from kvjax.reuse.pack import MoveShape
from kvjax.reuse.padding import LARGE_MOVE, PIECE_SIZES
from kvjax.reuse.plan import StagedPlan
from kvjax.reuse.read import ReadShape
from kvjax.reuse.repair import repair_shape
from kvjax.reuse.restore import CaptureShape, RestoreShape
from kvjax.reuse.strategy import Hit, ModelFacts, Prompt, Segment, Strategy

_SMALLEST = 128  # tokens of the smallest staged program of a ladder
_CHUNKS = 16  # that its programs hold; a prompt with more has one of its own
_TEXT = (8, 2)  # a program holds prompts whose text is up to one in so many tokens

Shape = MoveShape | ReadShape | StagedShape | AttendedShape | CaptureShape | RestoreShape


def reuse_programs(strategy: Strategy, facts: ModelFacts, max_model_len: int) -> tuple[Shape, ...]:
    """Shapes of the programs that serve any prompt of up to `_CHUNKS` chunks by `strategy`."""
    if type(strategy).look_up is Strategy.look_up:  # it never reuses a chunk
        return ()
    shapes: dict[Shape, None] = {}
    for size in PIECE_SIZES:
        shapes.update(dict.fromkeys(_beside(strategy, facts, size)))
    if max_model_len >= LARGE_MOVE // 2 and not strategy.keeps_hidden:
        shapes[MoveShape(LARGE_MOVE)] = None
    for size in _sizes(max_model_len - 2):  # the last token, and one to draw
        shapes.update(dict.fromkeys(_staged(strategy, facts, size)))
    return tuple(shapes)


def _beside(strategy: Strategy, facts: ModelFacts, size: int) -> Iterator[Shape]:
    """Programs that move, read and keep `size` tokens."""
    if strategy.keeps_hidden:
        width = facts.hidden_token_bytes // (facts.hidden_size * facts.num_layers)
        dtype = {2: "bfloat16", 4: "float32"}[width]
        yield CaptureShape(size, tuple(range(facts.num_layers)), dtype)
        yield RestoreShape(size, facts.hidden_size, dtype)
        return
    yield MoveShape(size)
    yield ReadShape(size)
    for rank, frame in strategy.patch_shapes:
        yield MoveShape(size, rank, frame)
    if strategy.attends:
        yield AttendedShape(size, PARTS)


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
    repairs = 0
    for question_last in (True, False):  # strategies plan otherwise where no text is behind chunks
        for share, prepared in itertools.product(_TEXT, (True, False)):
            text = min(-(-size // share), size - 2)
            plan = _plan(strategy, facts, size, text, question_last, prepared)
            if plan is None:
                continue
            hidden = any(stage.hidden for stage in plan.stages)
            width = facts.hidden_size if hidden else 0
            shape = dataclasses.replace(shape_of(plan, size, text, 2, width), chunks=_CHUNKS)
            yield shape
            stages = tuple(dataclasses.replace(stage, rows=size) for stage in shape.stages)
            yield dataclasses.replace(shape, stages=stages)
            repairs = plan.stages[0].l1 if strategy.repair else 0
    if repairs:
        yield repair_shape(size, strategy.repair, repairs - 1, facts.num_layers)


def _plan(
    strategy: Strategy, facts: ModelFacts, size: int, text: int, question_last: bool,
    prepared: bool,
) -> StagedPlan | None:  # fmt: skip
    """The plan for a made-up prompt of `size + 1` tokens: two chunks, and `text` around or before.
    `prepared`: chunks that the strategy has seen to; else such as others have stored."""
    tokens = tuple([1] * (size + 1))
    start = text // 2 if question_last else text
    stop = start + size - text
    middle = (start + stop) // 2
    hits = []
    for number, (a, b) in enumerate(((start, middle), (middle, stop))):
        segment = Segment(a, b, tokens_hash(tokens[a:b]))
        key = VariantKey(None, segment.chunk, "")
        variant = Variant(key, np.asarray(tokens[a:b]), 0, [], 0)
        if prepared:
            strategy.prepare(variant, facts)
        hits.append(Hit(number, segment, variant, a, b))
    prompt = Prompt(tokens, tuple(hit.segment for hit in hits), None, facts)
    try:
        plan = strategy.select(prompt, hits)
    except (KVJaxError, ValueError, LookupError):  # it wants to know more of a prompt
        return None
    return plan if isinstance(plan, StagedPlan) else None
