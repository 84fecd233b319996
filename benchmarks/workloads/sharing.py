"""How much of a workload could be reused, counted: what any cache can reach at most."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence

from kvjax.benchmarks.workloads import Part, Request

Encode = Callable[[str], Sequence[Hashable]]


@dataclasses.dataclass(frozen=True, slots=True)
class Sharing:
    """Tokens of all prompts, and of them those that came before.

    `prefix_tokens`: behind nothing but what an earlier prompt began with, too. `passage_tokens`: in
    passages that stood in an earlier prompt, anywhere, and are not among the `prefix_tokens`.
    """

    prompt_tokens: int
    prefix_tokens: int
    passage_tokens: int

    @property
    def prefix_share(self) -> float:
        """The highest hit rate that a prefix cache can have."""
        return self.prefix_tokens / self.prompt_tokens

    @property
    def passage_share(self) -> float:
        """What reuse of passages at other positions can add to it."""
        return self.passage_tokens / self.prompt_tokens


def count(requests: Sequence[Request], encode: Encode = str.split) -> Sharing:
    """Counts over requests in their order; an answer that is quoted counts as one token.

    Text counts in units of `encode`: words, or the tokens of a tokenizer.
    """
    seen: set[int] = set()  # hashes of every beginning of every prompt so far
    passages: set[tuple[Hashable, ...]] = set()
    total = prefix = elsewhere = 0
    for request in requests:
        chain, known, fresh = 0, True, []
        for part in request.parts:
            units = _units(part, encode)
            begun = 0
            for unit in units:
                chain = hash((chain, unit))
                known = known and chain in seen
                begun += known
                fresh.append(chain)
            total += len(units)
            prefix += begun
            if part.passage and units in passages:
                elsewhere += len(units) - begun
        passages.update(_units(part, encode) for part in request.parts if part.passage)
        seen.update(fresh)
    return Sharing(total, prefix, elsewhere)


def _units(part: Part, encode: Encode) -> tuple[Hashable, ...]:
    if part.output_of is not None:
        return (("output of", part.output_of),)
    return part.token_ids or tuple(encode(part.text))
