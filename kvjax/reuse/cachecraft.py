"""Cache-Craft (arXiv 2502.15734): KV kept from real prompts, in several variants per chunk.

A chunk that was computed in a prompt is kept as it is there, with the attention that its tokens
paid to each piece in front of them. For a later prompt the variant is taken whose cache fix
overhead (`kvjax.reuse.impact`) is least; that share of its tokens is run again, those that
attended most to other pieces (equation 14; fixed when the chunk is kept). After some layers,
chunks to which the question pays little attention are not run any further.

Of the paper only the abstract and notes of others were available, and there is no code. Inferred:
text in front of a chunk counts as a chunk; what becomes of a chunk kept with nothing in front;
`ratio`; the layer and the threshold of early termination, and that attention is compared per key of
a chunk, summed over the layers so far; a chunk is kept when each of its tokens was run, or was
exact. Attention is summed in a second pass over the kept chunk (`kept_layer_tokens`), where the
paper's kernels sum on the way. Not here: tiers below the device's memory, and preloading by layers.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from kvjax.cache.chunks import Variant
from kvjax.reuse.impact import Context, budget, budget_within, named, overhead
from kvjax.reuse.pieces import Piece, pieces_before
from kvjax.reuse.plan import Spans, Stage, StagedPlan, TopK, indices_to_spans, rest_of
from kvjax.reuse.report import Fate
from kvjax.reuse.strategy import (
    Found,
    Hit,
    ModelFacts,
    Observed,
    Prompt,
    ReadKV,
    Strategy,
    Workbench,
    count_of,
    ratio_of,
)

_NAME = "cachecraft"  # in a variant: its `Context` among the facts, its tokens' scores


@dataclasses.dataclass(frozen=True)
class CacheCraft(Strategy):
    """The variant with the least overhead, and as many of its tokens again as that overhead says.

    `LLM.chunks.put` also stores chunks alone; their tokens tie, and the first ones go first.

    Args:
      alpha: scales the overhead of each chunk into the share of its tokens that is run. The paper
        chooses it on validation data; 1 runs half of a chunk at least if its context is all new.
      ratio: of the reused tokens of a prompt; in place of `alpha`, which is made as large as that
        allows (inferred: it makes methods comparable at equal cost).
      whole: a chunk with this overhead is run whole, and so is kept as a new variant; without
        `ratio`. Notes of others have 0.7.
      variants: kept of one chunk, the paper's 5; those go whose uses saved least.
      focus: share of the layers after which only chunks that the question attends to go on; the
        paper sees them apart by layer 10 to 15 of 32. 1: never.
      focused: times the mean attention to the tokens run, which a chunk needs to go on.
    """

    name: ClassVar[str] = _NAME
    approximate: ClassVar[bool] = True
    query_aware: ClassVar[bool] = True
    attends: ClassVar[bool] = True
    alpha: float = 1.0
    ratio: float | None = None
    whole: float = 1.0
    variants: int = 5
    focus: float = 0.4
    focused: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("focused", self.focused)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if self.ratio is not None:
            ratio_of("ratio", self.ratio)
        ratio_of("whole", self.whole)
        ratio_of("focus", self.focus)
        count_of("variants", self.variants, 1)

    def prepare(self, variant: Variant, facts: ModelFacts) -> None:
        """Nothing in front of it."""
        variant.facts[_NAME] = _alone(variant.num_tokens)

    def annotate(self, variant: Variant, read: ReadKV) -> None:
        """Notes that a chunk encoded ahead of time has nothing in front of it."""
        if not variant.context_ids:
            variant.facts.setdefault(_NAME, _alone(variant.num_tokens))

    def look_up(self, prompt: Prompt, number: int, found: Found) -> Variant | None:
        """The variant with the least overhead; of equal ones that of the same context, then the
        one used last."""
        if prompt.learns:
            return None
        segment, new = prompt.segments[number], _names(pieces_before(prompt, number))
        before = prompt.tokens[: segment.start]

        def order(variant: Variant) -> tuple[float, bool, int]:
            cost = overhead(_context(variant), new)
            return cost, variant.context_ids != before, -variant.last_use

        return min(_kept(found, prompt.salt, segment.chunk), key=order, default=None)

    def select(self, prompt: Prompt, hits: Sequence[Hit]) -> Spans | StagedPlan:
        """The tokens that are run again; with early termination, the stages that run them."""
        rows = self._rows(prompt, hits)
        chosen = Spans(indices_to_spans(np.concatenate(rows)))
        layers = prompt.model.num_layers
        stop = max(1, round(self.focus * layers))
        start, end = prompt.question
        if self.ratio == 1 or stop >= layers or start == end or sum(map(len, rows)) == 0:
            return chosen
        if sum(len(some) > 0 for some in rows) < 2:  # one chunk is neither more nor less focused
            return chosen
        stored = tuple((hit.start, hit.stop) for hit in hits)
        text = Spans(rest_of(stored, prompt.num_exact, prompt.num_tokens - 1)).indices
        both = Spans(indices_to_spans(np.union1d(text, chosen.indices)))
        go_on = TopK("question_chunk_attention", chosen.num_rows, self.focused, layers="sum")
        return StagedPlan((Stage(0, stop, both), Stage(stop, layers, go_on)))

    def _rows(self, prompt: Prompt, hits: Sequence[Hit]) -> list[np.ndarray]:
        """Indices that are run again, ascending, of each hit."""
        sizes = [hit.stop - hit.start for hit in hits]
        if self.ratio == 1:
            return [np.arange(hit.start, hit.stop) for hit in hits]
        costs = [
            overhead(_context(hit.variant), _names(pieces_before(prompt, hit.number)))
            for hit in hits
        ]
        if self.ratio is None:
            shares = (min(1.0, self.alpha * cost) for cost in costs)
            counts = budget([1.0 if share >= self.whole else share for share in shares], sizes)
        else:
            counts = budget_within(costs, sizes, int(self.ratio * sum(sizes)))
        return [_most_contextual(hit, count) for hit, count in zip(hits, counts, strict=True)]

    def observe(self, observed: Observed, bench: Workbench) -> None:
        """Keeps the chunks that were computed, and what the used variants saved."""
        prompt, run = observed.prompt, observed.fates >= Fate.RECOMPUTED
        for start, stop, variant in observed.used:
            if _NAME in variant.facts:
                saved = 1 - float(run[:, start:stop].mean())
                before = float(variant.facts.get("saving", saved))
                variant.facts["saving"] = before + (saved - before) / max(1, variant.uses)
        whole = (run | (observed.fates == Fate.EXACT)).all(axis=0)
        for number, segment in enumerate(prompt.segments):
            if whole[segment.start : segment.stop].all():
                self._keep(prompt, number, bench)

    def _keep(self, prompt: Prompt, number: int, bench: Workbench) -> None:
        segment = prompt.segments[number]
        variant = bench.keep(number)
        if variant is None or _NAME in variant.facts:
            return
        pieces = [p for p in pieces_before(prompt, number) if p.start < p.stop]
        edges = [*(piece.start for piece in pieces), segment.start, segment.stop]
        sums = bench.attended(segment.start, segment.stop, edges)
        inter = sums[:, :, :-1]
        variant.scores[_NAME] = inter.sum(axis=2).mean(axis=0)
        variant.facts[_NAME] = Context(
            _names(pieces),
            tuple(piece.stop - piece.start for piece in pieces),
            inter.sum(axis=1),
            sums[:, :, -1].sum(axis=1),
            variant.num_tokens,
        )
        others = [v for v in _kept(bench, prompt.salt, segment.chunk) if v is not variant]
        for victim in eviction_order(others)[: len(others) + 1 - self.variants]:
            bench.discard(victim)


def eviction_order(variants: Sequence[Variant]) -> list[Variant]:
    """Unpinned variants, those first whose uses saved least: uses times the mean share of tokens
    that a use did not run (section on retention); then those used longest ago."""

    def order(variant: Variant) -> tuple[float, int]:
        return variant.uses * float(variant.facts.get("saving", 1.0)), variant.last_use

    return sorted((v for v in variants if not v.pins), key=order)


def _kept(found: Found, salt: str | None, chunk: str) -> list[Variant]:
    return [v for v in found.variants(salt, chunk).values() if _NAME in v.facts]


def _context(variant: Variant) -> Context:
    return Context(*variant.facts[_NAME])  # plain, if it comes from a file


def _names(pieces: Sequence[Piece]) -> tuple[str, ...]:
    return named([piece.name for piece in pieces if piece.start < piece.stop])


def _alone(num_tokens: int) -> Context:
    return Context((), (), np.zeros((1, 0), np.float32), np.ones(1, np.float32), num_tokens)


def _most_contextual(hit: Hit, count: int) -> np.ndarray:
    """The `count` tokens of a hit that attended most to what was in front, ascending."""
    scores = hit.variant.scores.get(_NAME)
    if scores is None:
        scores = np.zeros(hit.variant.num_tokens, np.float32)
    part = scores[hit.offset : hit.offset + hit.stop - hit.start]
    return hit.start + np.sort(np.argsort(-part, kind="stable")[:count])
