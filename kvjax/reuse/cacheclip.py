"""CacheClip (arXiv 2510.10129): chunks encoded behind one shared prefix, and windows of the tokens
that a small model's question attends to run again.

The shared prefix takes the place of each chunk's own sink; its KV is in the prompt once. A token is
chosen by attention of the question, softmax over its chunk, in the mean over heads and rows, the
best `ratio` over all chunks; then windows of 8 tokens with 5 chosen ones are run whole, and lonely
ones are dropped (8 and 5 are a re-implementation's).

The paper's selector is a second model, its last layer: SmolLM2-135M, fine-tuned in v1 by a recipe
that is not public. `selector` names one; it reads each chunk alone (inferred). Where its tokenizer
is another, it reads the same text, and a token scores what the best of those scores that it shares
a byte with (inferred: the paper maps by overlapping characters). Without one the model itself
selects, cut behind its first `selector_layers`, over the stored KV: the weaker selector by the
paper's own measurement.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from kvjax.models.tokenizers import Tokenizer
from kvjax.reuse.cacheblend import CacheBlend
from kvjax.reuse.plan import Spans, Stage, StagedPlan, TopK, indices_to_spans, rest_of
from kvjax.reuse.retokenised import carried, edges, retokenised
from kvjax.reuse.selector import Selector, load_selector, selector_tokenizer
from kvjax.reuse.strategy import (
    CanonicalChunks,
    Hit,
    Prompt,
    Tokens,
    count_of,
    ratio_of,
)
from kvjax.reuse.windows import group_windows


@dataclasses.dataclass(frozen=True)
class CacheClip(CanonicalChunks):
    """Windows around the `ratio` of reused tokens that the question attends to most.

    How many tokens windows make of that is in the report. A prompt without text behind its last
    chunk has no question; its tokens are then chosen as CacheBlend does, by deviation in layer 1.

    Args:
      ratio: of reused tokens that are chosen before they are grouped; the paper's 0.2.
      window: tokens of a window.
      least: chosen tokens that a window needs.
      selector_layers: of the model that select, without a `selector`; None is half of them.
      selector: a model as `LLM` takes it; loaded when it is first needed.
      prefix: what chunks are encoded behind. None: the text in front of the prompt's first chunk;
        then `LLM.chunks.put`, which sees no prompt, encodes chunks behind nothing.
    """

    name: ClassVar[str] = "cacheclip"
    query_aware: ClassVar[bool] = True
    ratio: float = 0.2
    window: int = 8
    least: int = 5
    selector_layers: int | None = None
    prefix: tuple[int, ...] | None = None
    selector: str | None = None
    # Of the model and of a selector that reads other ids; set by `for_tokenizer`.
    tokenizers: tuple[Tokenizer, Tokenizer] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        ratio_of("ratio", self.ratio)
        count_of("window", self.window, 1)
        count_of("least", self.least, 1)
        if self.least > self.window:
            raise ValueError(f"least must be at most {self.window=}, got {self.least}")
        if self.selector_layers is not None:
            count_of("selector_layers", self.selector_layers, 1)
        if self.selector is not None and self.selector_layers is not None:
            raise ValueError(f"{self.selector=} selects with its last layer: no selector_layers")

    def for_tokenizer(self, tokenizer: Tokenizer) -> "CacheClip":
        """With what carries a selector's scores over, if it reads other token ids."""
        if self.selector is None:
            return self
        theirs = selector_tokenizer(self.selector, tokenizer)
        return dataclasses.replace(self, tokenizers=None if theirs is None else (tokenizer, theirs))

    def enrich(self, tokens: Tokens, corpus: Sequence[Tokens]) -> Tokens:
        """The shared prefix, where it is given."""
        return self.prefix or ()

    def behind(self, prompt: Prompt, number: int) -> Tokens:
        """The shared prefix."""
        return prompt.head if self.prefix is None else self.prefix

    def select(self, prompt: Prompt, hits: Sequence[Hit]) -> Spans | StagedPlan:
        """A pass of the text without KV through the selector, then one with the windows as well."""
        spans = tuple((hit.start, hit.stop) for hit in hits)
        reused, layers = sum(b - a for a, b in spans), prompt.model.num_layers
        k = int(self.ratio * reused)
        if self.ratio == 1 or not k:
            return Spans(spans if self.ratio == 1 else ())
        start, stop = prompt.question
        if start == stop:
            return CacheBlend(ratio=self.ratio).select(prompt, hits)
        if self.selector is not None:
            return self._by(load_selector(self.selector), prompt, hits, k)
        text = Spans(rest_of(spans, prompt.num_exact, prompt.num_tokens - 1))
        selector = min(self.selector_layers or -(-layers // 2), layers)
        best = TopK("question_attention_within", k, window=(self.window, self.least))
        return StagedPlan((Stage(0, selector, text), Stage(0, layers, best)))

    def _by(self, selector: Selector, prompt: Prompt, hits: Sequence[Hit], k: int) -> Spans:
        """Windows around the `k` tokens that a second model's question attends to most. A chunk is
        scored whole, though its start may be an exact prefix."""
        question = prompt.tokens[prompt.question[0] :]
        reused = np.concatenate([np.arange(hit.start, hit.stop) for hit in hits])
        chunks = [prompt.chunk_tokens(hit.number) for hit in hits]
        scores = [
            of_chunk[hit.offset : hit.offset + hit.stop - hit.start]
            for hit, of_chunk in zip(hits, self._scores(selector, chunks, question), strict=True)
        ]
        best = np.argsort(-np.concatenate(scores), kind="stable")[:k]
        chosen = np.zeros(prompt.num_tokens - 1 - prompt.num_exact, bool)
        chosen[reused[best] - prompt.num_exact] = True
        windows = np.flatnonzero(group_windows(jnp.array(chosen), self.window, self.least))
        again = np.intersect1d(windows + prompt.num_exact, reused)
        return Spans(indices_to_spans(again))

    def _scores(
        self, selector: Selector, chunks: Sequence[Tokens], question: Tokens
    ) -> list[np.ndarray]:
        """One number per token of each chunk."""
        if self.tokenizers is None:
            return selector.scores(chunks, question)
        ours, theirs = self.tokenizers
        *read, asked = (retokenised(ids, ours, theirs) for ids in (*chunks, question))
        if not asked or not all(read):
            return [np.zeros(len(tokens), np.float32) for tokens in chunks]
        return [
            carried(scores, edges(told, theirs), edges(tokens, ours))
            for scores, told, tokens in zip(selector.scores(read, asked), read, chunks, strict=True)
        ]
