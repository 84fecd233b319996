"""RelayCaching (arXiv 2603.13289): what a model wrote is reused where the next prompt quotes it.

The KV that decoding wrote deviates from that of a full prefill in few tokens and in the middle
layers. Every row is run in the lower layers; the tokens whose values deviate most there are run
again up to the end of a layer range; above it stored KV is kept, and only text is run.

The paper's text was not available: the range and the threshold are from notes of others.
Inferred: rows of the lower layers start from the embeddings, since no hidden states are stored, and
cost what they cost; the range is the caller's, no profile of the model is made; tokens are chosen
by deviation alone, not also by the attention of the text behind.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from kvjax.cache.chunks import Variant
from kvjax.reuse.plan import Spans, Stage, StagedPlan, TopK, rest_of
from kvjax.reuse.strategy import CanonicalChunks, Found, Hit, Prompt, Tokens, count_of, ratio_of

_SCORE = "value_angle"


@dataclasses.dataclass(frozen=True)
class RelayCaching(CanonicalChunks):
    """Outputs kept by `LLM.relay`, and canonical chunks where no output has these tokens.

    Args:
      detect: layers at the bottom in which every row is run; values are compared in the last.
      end: layers from here on run no reused token; None: the range reaches the top.
      threshold: tokens are run again whose 1 - cosine is at least this many times the mean.
      most: share of the reused tokens that are run again at most, which bounds the work.
    """

    name: ClassVar[str] = "relaycaching"
    detect: int = 2
    end: int | None = None
    threshold: float = 1.5
    most: float = 0.5

    def __post_init__(self) -> None:
        count_of("detect", self.detect, 1)
        if self.end is not None:
            count_of("end", self.end, self.detect)
        number = isinstance(self.threshold, int | float) and not isinstance(self.threshold, bool)
        if not number or self.threshold < 0:
            raise ValueError(f"threshold must be a number of at least 0, got {self.threshold!r}")
        ratio_of("most", self.most)

    def wanted(self, prompt: Prompt, number: int, found: Found) -> Tokens | None:
        """The canonical variant of what nobody has written."""
        return () if _written(prompt, number, found) is None else None

    def look_up(self, prompt: Prompt, number: int, found: Found) -> Variant | None:
        """What was written in front of the same tokens, else what was written last, else the
        canonical variant."""
        return _written(prompt, number, found) or super().look_up(prompt, number, found)

    def select(self, prompt: Prompt, hits: Sequence[Hit]) -> Spans | StagedPlan:
        """Every row, then what deviates, then text alone."""
        layers = prompt.model.num_layers
        if self.detect >= layers or not hits:
            return Spans(tuple((hit.start, hit.stop) for hit in hits))
        end = layers if self.end is None else min(self.end, layers)
        reused = sum(hit.stop - hit.start for hit in hits)
        everything = Spans(rest_of((), prompt.num_exact, prompt.num_tokens - 1))
        deviating = TopK(_SCORE, int(self.most * reused), self.threshold)
        stages = [
            Stage(0, self.detect, everything),
            Stage(self.detect, end, deviating),
            Stage(end, layers, TopK(_SCORE, 0)),  # text is always run, and nothing else is
        ]
        return StagedPlan(tuple(stage for stage in stages if stage.l0 < stage.l1))


def _written(prompt: Prompt, number: int, found: Found) -> Variant | None:
    segment = prompt.segments[number]
    variants = found.variants(prompt.salt, segment.chunk).values()
    written = [v for v in variants if v.facts.get("born") == "decode"]
    if not written:
        return None
    before = prompt.tokens[: segment.start]
    exact = (v for v in written if v.lineage == "exact" and v.context_ids == before)
    return next(exact, written[-1])
