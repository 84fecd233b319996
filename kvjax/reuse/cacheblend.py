"""CacheBlend (arXiv 2405.16444, sections 4 and 5): run again what deviates most in an early layer.

Layer 0's KV depends on the token alone, so layer 1 is the first in which a chunk encoded alone
differs from the same chunk in its context. Every row is run up to there; the rows whose new KV
differs most from the stored KV go on. The deviation of values is what the authors' code ranks by,
that of keys what LMCache does.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from kvjax.reuse.link import check_link, hidden_ratio
from kvjax.reuse.plan import Spans, Stage, StagedPlan, TopK, rest_of
from kvjax.reuse.strategy import (
    CanonicalChunks,
    Hit,
    ModelFacts,
    Prompt,
    Tokens,
    count_of,
    ratio_of,
)

_SCORES = {"v": "value_deviation", "k": "key_deviation", "kv": "kv_deviation"}


@dataclasses.dataclass(frozen=True)
class CacheBlend(CanonicalChunks):
    """The `ratio` of reused tokens with the highest KV deviation in `check_layer`.

    Args:
      ratio: of reused tokens that are run in every layer; the paper's default is 0.15.
      check_layer: 0-based; all rows are run up to and including it.
      score: "v", "k" or "kv": what deviates.
      update: "all" keeps the fresh KV of every row in the check layer (the authors' code),
        "chosen" only that of the chosen rows (LMCache).
      gradual: start with `first` times the ratio behind the check layer and narrow it over `steps`
        further layers, to what makes `ratio` the mean over layers (gradual filtering, section 4.3;
        its schedule is inferred).
      mask: "position", or "bottom_right" to reproduce the published code, in which most chosen
        rows see tokens behind them.
      head: encode chunks behind the text in front of the prompt's first chunk, which takes the
        place of each chunk's own sink (CacheClip's shared prefix; not in the paper).
      link: bytes a second that stored KV would come at, and
      prefill: tokens a second that the model computes. With both the ratio is the one whose
        computing takes as long as loading, `ratio` at least (the loading controller, section 5).
    """

    name: ClassVar[str] = "cacheblend"
    ratio: float = 0.15
    check_layer: int = 1
    score: Literal["v", "k", "kv"] = "v"
    update: Literal["all", "chosen"] = "all"
    gradual: bool = False
    first: float = 1.5
    steps: int = 3
    mask: Literal["position", "bottom_right"] = "position"
    head: bool = False
    link: float | None = None
    prefill: float | None = None

    def __post_init__(self) -> None:
        ratio_of("ratio", self.ratio)
        count_of("check_layer", self.check_layer)
        count_of("steps", self.steps, 1)
        for name, value, allowed in (
            ("score", self.score, tuple(_SCORES)),
            ("update", self.update, ("all", "chosen")),
            ("mask", self.mask, ("position", "bottom_right")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        if not isinstance(self.first, int | float) or self.first < 1:
            raise ValueError(f"first must be a number of at least 1, got {self.first!r}")
        check_link(self.link, self.prefill)

    def ratio_for(self, model: ModelFacts) -> float:
        """Share of reused tokens that are run in every layer."""
        if self.link is None or self.prefill is None:
            return self.ratio
        return hidden_ratio(1 / self.prefill, model.kv_token_bytes / self.link, self.ratio)

    def behind(self, prompt: Prompt, number: int) -> Tokens:
        """The head, if asked for."""
        return prompt.head if self.head else ()

    def select(self, prompt: Prompt, hits: Sequence[Hit]) -> Spans | StagedPlan:
        """Every row up to the check layer, then the best."""
        reused = sum(hit.stop - hit.start for hit in hits)
        layers, ratio = prompt.model.num_layers, self.ratio_for(prompt.model)
        if ratio == 1 or not reused:
            return Spans(tuple((hit.start, hit.stop) for hit in hits))
        everything = Spans(rest_of((), prompt.num_exact, prompt.num_tokens - 1))
        check = min(self.check_layer + 1, layers)
        score = _SCORES[self.score]
        stages = [Stage(0, check, everything, self.update)]
        for l0, l1, share in self._schedule(check, layers, ratio):
            stages.append(Stage(l0, l1, TopK(score, int(share * reused)), self.update))
        return StagedPlan(tuple(stages), self.mask)

    def _schedule(self, check: int, layers: int, ratio: float) -> list[tuple[int, int, float]]:
        """Layers and share of rows of each stage above the check layer."""
        above, steps = layers - check, self.steps
        if not self.gradual or above <= steps:
            return [(check, layers, ratio)] if check < layers else []
        most = min(1.0, self.first * ratio)
        # Shares fall by equal steps from `most` to `last`, which all the rest keep.
        wide = (steps + 1) / 2
        last = max(0.0, (above * ratio - wide * most) / (above - wide))
        shares = [most + (last - most) * i / steps for i in range(steps)]
        narrowing = [(check + i, check + i + 1, share) for i, share in enumerate(shares)]
        return [*narrowing, (check + steps, layers, last)]
