"""EPIC's LegoLink (arXiv 2410.15332, section 4): the first tokens of every chunk are run again.

A chunk's first token was position 0 when it was encoded, and serves as a sink of attention. Letting
the first few see what is really in front of them removes the false sink; no token is scored.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from kvjax.cache.chunks import Variant
from kvjax.reuse.plan import Spans
from kvjax.reuse.strategy import (
    CanonicalChunks,
    Found,
    Hit,
    Prompt,
    Tokens,
    context_hash,
    count_of,
)


@dataclasses.dataclass(frozen=True)
class Epic(CanonicalChunks):
    """LegoLink-k: the first `k` tokens of every chunk that does not begin the prompt.

    The paper advises k <= 32. With `k=0` and a `sink` token (LegoLink-0, from the authors' code)
    chunks are encoded behind `dummies + 1` such tokens whose KV is dropped: they take the sink's
    place, and nothing is run again.
    """

    name: ClassVar[str] = "epic"
    k: int = 16
    sink: int | None = None
    dummies: int = 3

    def __post_init__(self) -> None:
        count_of("k", self.k)
        count_of("dummies", self.dummies)
        if self.sink is not None:
            count_of("sink", self.sink)

    @property
    def _context(self) -> Tokens:
        return () if self.sink is None else (self.sink,) * (self.dummies + 1)

    def _behind(self, prompt: Prompt, number: int) -> Tokens:
        """What begins the prompt is its own sink, and exact as it is."""
        return self._context if prompt.segments[number].start else ()

    def enrich(self, tokens: Tokens, corpus: Sequence[Tokens]) -> Tokens:
        """The dummies, if any."""
        return self._context

    def wanted(self, prompt: Prompt, number: int, found: Found) -> Tokens | None:
        """The dummies, if any, for what does not begin the prompt."""
        return self._behind(prompt, number)

    def look_up(self, prompt: Prompt, number: int, found: Found) -> Variant | None:
        """The variant behind the dummies."""
        key = context_hash(self._behind(prompt, number))
        return found.variants(prompt.salt, prompt.segments[number].chunk).get(key)

    def select(self, prompt: Prompt, hits: Sequence[Hit]) -> Spans:
        """The first `k` tokens of each hit."""
        spans = []
        for hit in hits:
            stop = min(hit.segment.start + self.k, hit.stop)
            if hit.segment.start > 0 and stop > hit.start:
                spans.append((hit.start, stop))
        return Spans(tuple(spans))
