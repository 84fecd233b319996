"""Selectors to compare with: chance, and the deviation that only a full prefill knows."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from kvjax.reuse.plan import Spans, indices_to_spans, spans_to_indices
from kvjax.reuse.strategy import CanonicalChunks, Hit, Prompt, count_of, ratio_of


@dataclasses.dataclass(frozen=True)
class RandomTokens(CanonicalChunks):
    """A seeded choice of reused tokens, the same for the same prompt."""

    name: ClassVar[str] = "random"
    ratio: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        ratio_of("ratio", self.ratio)
        count_of("seed", self.seed)

    def select(self, prompt: Prompt, hits: Sequence[Hit]) -> Spans:
        """`ratio` of the reused tokens."""
        reused = spans_to_indices([(hit.start, hit.stop) for hit in hits])
        draw = np.random.default_rng([self.seed, prompt.num_tokens])
        chosen = draw.choice(reused, int(self.ratio * len(reused)), replace=False)
        return Spans(indices_to_spans(np.sort(chosen)))


@dataclasses.dataclass(frozen=True)
class Oracle(CanonicalChunks):
    """The reused tokens whose KV deviates most from a full prefill's, over all layers.

    The deviations come with the request (`extra_args["oracle"]`, one number per prompt token):
    whoever asks for this has run the full prefill.
    """

    name: ClassVar[str] = "oracle"
    ratio: float = 0.15

    def __post_init__(self) -> None:
        ratio_of("ratio", self.ratio)

    def select(self, prompt: Prompt, hits: Sequence[Hit]) -> Spans:
        """`ratio` of the reused tokens. Raises `ValueError` without deviations to go by."""
        deviation = prompt.options.get("oracle")
        if deviation is None or len(deviation) != prompt.num_tokens:
            raise ValueError(
                f"the oracle needs extra_args['oracle'] with {prompt.num_tokens} numbers, got "
                f"{None if deviation is None else len(deviation)}"
            )
        reused = spans_to_indices([(hit.start, hit.stop) for hit in hits])
        scores = np.asarray(deviation, np.float64)[reused]
        best = np.argsort(-scores, kind="stable")[: int(self.ratio * len(reused))]
        return Spans(indices_to_spans(np.sort(reused[best])))
