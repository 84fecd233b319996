"""RelayCaching (arXiv 2603.13289): what a model wrote is reused where the next prompt quotes it.

The KV that decoding wrote deviates from that of a full prefill in few tokens and in the middle
layers. Below a range of layers and above it stored KV is kept; at its bottom every quoted token is
run, and those whose values deviate, or which the question attends to, are run on to its top.

A row that is run in the range needs what enters it there. Either it is run from the embeddings on
(`start=0`: that costs the layers below, in which it writes its KV too), or what entered layer
`start` when the text was written is stored with it (`LLM.relay(entering=start)`), and taken for
what would enter now: shallow deviations are small.

The paper's text was not available: equations and constants are from notes of others. Inferred: both
ways to begin; the question's attention is that of the layer in which values are compared, not of
all layers; how a range is found (`kvjax.relay_profile`).
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from kvjax.cache.chunks import Variant
from kvjax.reuse.plan import Spans, Stage, StagedPlan, TopK, rest_of
from kvjax.reuse.restore import entering_name
from kvjax.reuse.strategy import (
    CanonicalChunks,
    Found,
    Hit,
    ModelFacts,
    Prompt,
    Tokens,
    count_of,
    ratio_of,
)


@dataclasses.dataclass(frozen=True)
class RelayCaching(CanonicalChunks):
    """Outputs kept by `LLM.relay`, and canonical chunks where no output has these tokens.

    Args:
      start: the first layer in which quoted tokens are run, from stored hidden states; 0: from the
        embeddings. Chunks that have none stored are run from there in any case.
      detect: layers from here on run only what is chosen; values are compared in the one below.
      end: layers from here on run no reused token; None: the range reaches the top.
      threshold: tokens are run again whose 1 - cosine is at least this many times the mean.
      influence: and those to which the question attends this many times the mean; 0: not by that.
      suffix: tokens at the end of the question whose attention counts.
      most: share of the reused tokens that are run again at most, which bounds the work.
    """

    name: ClassVar[str] = "relaycaching"
    query_aware: ClassVar[bool] = True
    start: int = 0
    detect: int = 2
    end: int | None = None
    threshold: float = 1.5
    influence: float = 1.45
    suffix: int = 10
    most: float = 0.5

    def __post_init__(self) -> None:
        count_of("start", self.start)
        count_of("detect", self.detect, self.start + 1)
        if self.end is not None:
            count_of("end", self.end, self.detect)
        for name, value in (("threshold", self.threshold), ("influence", self.influence)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not value >= 0:
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        count_of("suffix", self.suffix, 1)
        ratio_of("most", self.most)

    def prepare(self, variant: Variant, facts: ModelFacts) -> None:
        """What enters layer `start`."""
        if self.start:
            rows = np.zeros((variant.num_tokens, facts.hidden_size), np.float32)
            variant.arrays[entering_name(self.start)] = rows

    def wanted(self, prompt: Prompt, number: int, found: Found) -> Tokens | None:
        """The canonical variant of what nobody has written."""
        return () if _written(prompt, number, found) is None else None

    def look_up(self, prompt: Prompt, number: int, found: Found) -> Variant | None:
        """What was written in front of the same tokens, else what was written last, else the
        canonical variant."""
        return _written(prompt, number, found) or super().look_up(prompt, number, found)

    def select(self, prompt: Prompt, hits: Sequence[Hit]) -> Spans | StagedPlan:
        """Every row, then what deviates or matters, then text alone."""
        layers = prompt.model.num_layers
        if self.detect >= layers or not hits:
            return Spans(tuple((hit.start, hit.stop) for hit in hits))
        end = layers if self.end is None else min(self.end, layers)
        reused = sum(hit.stop - hit.start for hit in hits)
        chosen = self._choice(int(self.most * reused))
        stages = [
            *self._lower(prompt, hits),
            Stage(self.detect, end, chosen),
            Stage(end, layers, TopK(chosen.score, 0)),  # text is always run, and nothing else is
        ]
        return StagedPlan(tuple(stage for stage in stages if stage.l0 < stage.l1))

    def _lower(self, prompt: Prompt, hits: Sequence[Hit]) -> list[Stage]:
        """The stages up to `detect`: what has nothing stored from the embeddings on, the rest from
        `start` on."""
        end, name = prompt.num_tokens - 1, entering_name(self.start)
        everything = Spans(rest_of((), prompt.num_exact, end))
        stored = [(hit.start, hit.stop) for hit in hits if name in hit.variant.arrays]
        if not self.start or not stored:
            return [Stage(0, self.detect, everything)]
        rest = Spans(rest_of(stored, prompt.num_exact, end))
        lower = [Stage(0, self.start, rest)] if rest.spans else []
        return [*lower, Stage(self.start, self.detect, everything, hidden=name)]

    def _choice(self, most: int) -> TopK:
        if not self.influence:
            return TopK("value_angle", most, self.threshold)
        if not self.threshold:  # everything deviates that much
            return TopK("value_angle", most, 0.0)
        numbers = f"{self.threshold},{self.influence},{self.suffix}"
        return TopK(f"deviation_or_influence:{numbers}", most, floor=1.0)


def _written(prompt: Prompt, number: int, found: Found) -> Variant | None:
    segment = prompt.segments[number]
    variants = found.variants(prompt.salt, segment.chunk).values()
    written = [v for v in variants if v.facts.get("born") == "decode"]
    if not written:
        return None
    before = prompt.tokens[: segment.start]
    exact = (v for v in written if v.lineage == "exact" and v.context_ids == before)
    return next(exact, written[-1])
