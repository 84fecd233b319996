"""The sizes that step programs are compiled in."""

import dataclasses

from kvjax.step import Bucket
from kvjax.step_plan import Limits

_SMALLEST = 16  # tokens of the smallest mixed program


def ladder(limits: Limits, cascade: bool = False) -> tuple[Bucket, ...]:
    """The programs of an engine: decode by sequences, mixed by tokens, one to score prompts.

    With `cascade`, decode programs of two sequences or more have a twin for shared prefixes.

    Powers of two up to the limits, which are themselves the last rungs: nothing is ever padded
    beyond the step's budget.
    """
    seqs = limits.max_num_seqs
    decode = [Bucket(n, n, n, True) for n in _rungs(1, seqs)]
    first = min(_SMALLEST, limits.max_num_batched_tokens)
    mixed = [Bucket(n, seqs, seqs, False) for n in _rungs(first, limits.max_num_batched_tokens)]
    scored = limits.max_scored_tokens
    score = [Bucket(scored, seqs, scored, False)] if scored > seqs else []
    twins = [dataclasses.replace(b, cascade=True) for b in decode if cascade and b.seqs > 1]
    return (*sorted([*decode, *mixed, *score]), *twins)


def _rungs(first: int, last: int) -> list[int]:
    rungs = []
    while first < last:
        rungs.append(first)
        first *= 2
    return [*rungs, last]
