"""KVShare (arXiv 2503.16525 v2): run again what deviates and is attended to.

A token scores the attention it receives times the L1 distance of its new and stored values. Values
alone are compared: by the paper keys would choose 80 to 90 % of the same tokens.

Inferred: the layer that is scored, and that every row is run up to there (the distance needs true
values); attention is summed over all rows and heads of that layer. In decoding, which reads KV that
earlier tokens have read before it was repaired: that the distance is the one found in the prompt,
and that each token is repaired once at most. Not here: the match of spans without marks, and
sharing beyond a salt. Only chunks encoded alone are shared.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from kvjax.reuse.plan import Spans, Stage, StagedPlan, TopK, rest_of
from kvjax.reuse.strategy import CanonicalChunks, Hit, Prompt, count_of, ratio_of


@dataclasses.dataclass(frozen=True)
class KVShare(CanonicalChunks):
    """The `ratio` of reused tokens with the highest attention times deviation in `check_layer`.

    Args:
      ratio: of reused tokens that are run in every layer; the paper tries 0.1 to 0.4.
      check_layer: 0-based; all rows are run up to and including it. In layer 0 nothing deviates.
      repair: reused tokens run again between two decode steps, chosen by the attention of a token
        just drawn; the paper's 3, at a step of its own each time. Such a prompt's blended KV is not
        cached, and where branches share it (`n > 1`), it is left as it is. A sequence that is
        preempted starts over with it, so its tokens may then differ.
    """

    name: ClassVar[str] = "kvshare"
    query_aware: ClassVar[bool] = True  # the question's rows attend, too
    ratio: float = 0.2
    check_layer: int = 1
    repair: int = 0

    def __post_init__(self) -> None:
        ratio_of("ratio", self.ratio)
        count_of("check_layer", self.check_layer)
        count_of("repair", self.repair)

    def select(self, prompt: Prompt, hits: Sequence[Hit]) -> Spans | StagedPlan:
        """Every row up to the check layer, then the best."""
        if self.ratio == 1:
            return Spans(tuple((hit.start, hit.stop) for hit in hits))
        everything = Spans(rest_of((), prompt.num_exact, prompt.num_tokens - 1))
        layers = prompt.model.num_layers
        check = min(self.check_layer + 1, layers)
        stages = [Stage(0, check, everything)]
        if check < layers:
            k = int(self.ratio * sum(hit.stop - hit.start for hit in hits))
            keeps = "value_distance" if self.repair else None
            best = TopK("attention_value_deviation", k, keeps=keeps)
            stages.append(Stage(check, layers, best))
        return StagedPlan(tuple(stages))
