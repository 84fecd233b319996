"""From a prompt, a strategy and the chunk store to what the engine has to do. Host only.

[0, num_exact)      found in the prefix tree, exactly
hits                moved from a stored variant into the request's own slots
everything else     computed; so is the last token, always
"""

import dataclasses
import hashlib

import numpy as np

from kvjax.cache.chunks import ChunkStore, Variant
from kvjax.reuse.plan import (
    Spans,
    StagedPlan,
    indices_to_spans,
    rest_of,
    spans_to_indices,
    validate,
)
from kvjax.reuse.report import Fate, ReuseReport
from kvjax.reuse.strategy import Hit, KVPatch, Prompt, Strategy


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """Tokens `[start, stop)` of a prompt, from token `offset` of a variant on."""

    variant: Variant
    start: int
    stop: int
    offset: int
    shift: int
    patch: KVPatch | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Assembly:
    """How a prompt's KV comes about, decided before any of it is computed."""

    moves: tuple[Move, ...]
    reused: tuple[tuple[int, int], ...]  # spans that no ordinary step computes
    staged: StagedPlan | None
    always: np.ndarray  # indices without stored KV, the last token left out
    exact_end: int  # tokens before it are as exact as a full prefill
    lineage: str  # "exact", or what everything from `exact_end` on depends on
    report: ReuseReport
    repair: int = 0  # rows run again between two decode steps: nobody else may use its pages

    def found(self) -> "Assembly":
        """The same once its result is found in the cache: only the last token is run."""
        report = dataclasses.replace(
            self.report, copied_tokens=0, run_layer_tokens=self.report.num_layers
        )
        return dataclasses.replace(self, moves=(), reused=(), staged=None, report=report)


def find_hits(strategy: Strategy, prompt: Prompt, store: ChunkStore) -> tuple[Hit, ...]:
    """Variants that serve the prompt's chunks, behind the exact prefix, up to the last token."""
    hits = []
    for number, segment in enumerate(prompt.segments):
        start = max(segment.start, prompt.num_exact)
        stop = min(segment.stop, prompt.num_tokens - 1)
        if start >= stop:
            continue
        variant = strategy.look_up(prompt, number, store)
        store.looked_up(variant is not None)
        if variant is not None:
            # A variant born in decoding may lack the KV of its last token.
            stop = min(stop, segment.start + variant.num_tokens)
            if start < stop:
                hits.append(Hit(number, segment, variant, start, stop))
    return tuple(hits)


def assemble(strategy: Strategy, prompt: Prompt, store: ChunkStore) -> Assembly:
    """What to do for a prompt.

    Raises:
      InvalidPlan: the strategy's plan cannot be carried out.
    """
    hits = find_hits(strategy, prompt, store)
    for hit in hits:
        store.use(hit.variant)
    exact_end, exact_hits = _exact_reach(prompt, hits)
    moves = []
    for hit in hits:
        patch = None if hit in exact_hits else strategy.patch(prompt, hit, hits, store)
        shift = hit.shift if strategy.rotates else 0
        moves.append(Move(hit.variant, hit.start, hit.stop, hit.offset, shift, patch))
    blended = [hit for hit in hits if hit not in exact_hits]
    selected = strategy.select(prompt, blended) if blended else Spans(())
    spans = tuple((hit.start, hit.stop) for hit in hits)
    always = spans_to_indices(rest_of(spans, prompt.num_exact, prompt.num_tokens - 1))
    staged, again = None, np.zeros(0, np.int32)
    if isinstance(selected, StagedPlan):
        validate(selected, prompt.model.num_layers, prompt.num_tokens, always)
        staged, reused = selected, ((prompt.num_exact, prompt.num_tokens - 1),)
    else:
        again = selected.indices
        moves = [m for m in moves if not np.isin(np.arange(m.start, m.stop), again).all()]
        reused = indices_to_spans(np.setdiff1d(spans_to_indices(spans), again))
    fates = _fates(prompt, moves, exact_end, again)
    # Stages count their own rows; ordinary steps then run the last token.
    run = 1 if staged is not None else int((fates >= Fate.RECOMPUTED).sum())
    layers = prompt.model.num_layers
    report = ReuseReport(
        strategy.spec,
        ((0, layers),),
        fates[None],
        copied_tokens=sum(move.stop - move.start for move in moves),
        run_layer_tokens=run * layers,
    )
    lineage = _lineage(strategy, prompt, moves) if blended else "exact"
    repair = 0 if staged is None else strategy.repair
    return Assembly(tuple(moves), reused, staged, always, exact_end, lineage, report, repair)


def _exact_reach(prompt: Prompt, hits: tuple[Hit, ...]) -> tuple[int, set[Hit]]:
    """How far the prompt is exact, and the hits within: their context is what is before them."""
    exact = set()
    for hit in hits:
        variant, start = hit.variant, hit.segment.start
        same = variant.lineage == "exact" and variant.base == start
        if not same or variant.context_ids != prompt.tokens[:start]:
            return hit.start, exact
        exact.add(hit)
    return prompt.num_tokens, exact


def _fates(prompt: Prompt, moves: list[Move], exact_end: int, again: np.ndarray) -> np.ndarray:
    fates = np.full(prompt.num_tokens, Fate.COMPUTED, np.int8)
    fates[: prompt.num_exact] = Fate.EXACT
    for move in moves:
        moved = Fate.SHIFTED if move.patch is None else Fate.PATCHED
        fates[move.start : move.stop] = Fate.EXACT if move.stop <= exact_end else moved
    fates[again] = Fate.RECOMPUTED
    return fates


def _lineage(strategy: Strategy, prompt: Prompt, moves: list[Move]) -> str:
    """What KV behind the first approximate token depends on, beside the tokens before it."""
    digest = hashlib.blake2b(strategy.spec.encode(), digest_size=16)
    for move in moves:
        patch = None if move.patch is None else (move.patch.rank, move.patch.origin)
        digest.update(repr((move.start, move.stop, move.shift, move.variant.key, patch)).encode())
    if strategy.query_aware:
        digest.update(np.asarray(prompt.tokens, np.int64).tobytes())
    return digest.hexdigest()
