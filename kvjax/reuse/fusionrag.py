"""FusionRAG (arXiv 2601.12904): chunks encoded behind their likely neighbours, and the tokens that
the question attends to run again.

Offline (section on similarity-guided preprocessing): a chunk is computed behind the chunks most
like it, and its own KV is kept. Online (query-guided selection): the question runs over the stored
KV; in the last layer, softmax over each chunk by itself, summed over heads and question rows,
scores the chunk's tokens; the best of all chunks run again, from layer 0.

Inferred: the order of neighbours (most similar first); that the question sees the stale KV while it
is scored; the sum over heads. Neighbours are found by TF-IDF over token ids where the paper embeds
chunks with BGE-M3, and are computed as plain text, where the paper puts their own stored KV in
front; the system prompt stands before them where it is given (`system`).
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from kvjax.cache.chunks import Variant
from kvjax.reuse.cacheblend import CacheBlend
from kvjax.reuse.neighbours import SIMILARITIES, neighbours
from kvjax.reuse.plan import Spans, Stage, StagedPlan, TopK, rest_of
from kvjax.reuse.strategy import (
    CanonicalChunks,
    Found,
    Hit,
    Prompt,
    ReadKV,
    Tokens,
    context_hash,
    count_of,
    ratio_of,
)

_FACT = "fusionrag"  # of an enriched variant: the settings it was made with


@dataclasses.dataclass(frozen=True)
class FusionRAG(CanonicalChunks):
    """The `ratio` of reused tokens that the question attends to most, over enriched chunks.

    Chunks are enriched by `LLM.chunks.put` only: a prompt that misses one encodes it alone, and
    that variant serves until an enriched one is there. A prompt without text behind its last chunk
    has no question; its tokens are then chosen as CacheBlend does, by deviation in layer 1.

    Args:
      ratio: of reused tokens that are run in every layer; the paper's default is 0.15.
      neighbours: chunks in front of an enriched one, the paper's 10; 0 uses chunks encoded alone.
      similarity: a name in `kvjax.reuse.neighbours.SIMILARITIES`.
      max_context: tokens of neighbours at most; those that do not fit are left out.
      system: tokens in front of the neighbours, the S of the paper's equation 10.
    """

    name: ClassVar[str] = "fusionrag"
    query_aware: ClassVar[bool] = True
    ratio: float = 0.15
    neighbours: int = 10
    similarity: str = "tfidf"
    max_context: int = 4096
    system: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        ratio_of("ratio", self.ratio)
        count_of("neighbours", self.neighbours)
        count_of("max_context", self.max_context)
        if self.similarity not in SIMILARITIES:
            raise ValueError(
                f"similarity must be one of {sorted(SIMILARITIES)}, got {self.similarity!r}"
            )

    @property
    def _made_with(self) -> tuple[int, str, int, tuple[int, ...]]:
        return self.neighbours, self.similarity, self.max_context, self.system

    def enrich(self, tokens: Tokens, corpus: Sequence[Tokens]) -> Tokens:
        """The system prompt and the chunks of the corpus most like this one, most similar first."""
        context: Tokens = ()
        similarity = SIMILARITIES[self.similarity]
        for number in neighbours(tokens, corpus, self.neighbours, similarity):
            if len(context) + len(corpus[number]) <= self.max_context:
                context += tuple(corpus[number])
        return self.system + context if self.neighbours else ()

    def annotate(self, variant: Variant, read: ReadKV) -> None:
        """Tells enriched variants from those that others keep behind some context."""
        if variant.context_ids:
            variant.facts[_FACT] = self._made_with

    def wanted(self, prompt: Prompt, number: int, found: Found) -> Tokens | None:
        """The canonical variant, unless an enriched one is there."""
        return () if self._enriched(prompt, number, found) is None else None

    def look_up(self, prompt: Prompt, number: int, found: Found) -> Variant | None:
        """The enriched variant, or else the canonical one."""
        enriched = self._enriched(prompt, number, found)
        if enriched is not None:
            return enriched
        return found.variants(prompt.salt, prompt.segments[number].chunk).get(context_hash(()))

    def _enriched(self, prompt: Prompt, number: int, found: Found) -> Variant | None:
        """The newest or most recently used: a corpus that changed gives other neighbours."""
        if not self.neighbours:
            return None
        variants = found.variants(prompt.salt, prompt.segments[number].chunk).values()
        made = [v for v in variants if v.facts.get(_FACT) == self._made_with]
        return max(made, key=lambda v: v.last_use, default=None)

    def select(self, prompt: Prompt, hits: Sequence[Hit]) -> Spans | StagedPlan:
        """A pass of the text without KV for scores, then one with the best tokens as well."""
        spans = tuple((hit.start, hit.stop) for hit in hits)
        reused, layers = sum(b - a for a, b in spans), prompt.model.num_layers
        k = int(self.ratio * reused)
        if self.ratio == 1 or not k:
            return Spans(spans if self.ratio == 1 else ())
        start, stop = prompt.question
        if start == stop:
            return CacheBlend(ratio=self.ratio).select(prompt, hits)
        # Text between chunks has no KV either: the question would see what was there before it.
        text = Spans(rest_of(spans, prompt.num_exact, prompt.num_tokens - 1))
        best = TopK("question_attention_within", k)
        return StagedPlan((Stage(0, layers, text), Stage(0, layers, best)))
