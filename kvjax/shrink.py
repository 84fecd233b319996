"""What a step may hold after the device ran out of memory: the next smaller compiled program.

The limits stay down until the engine is made anew: what was too much once may be again, and every
try costs all KV on the device.
"""

from collections.abc import Iterable, Sequence

from kvjax.step import Bucket
from kvjax.step_plan import Limits, StepPlan


def out_of_memory(error: BaseException) -> bool:
    """Whether the device's runtime raised because an allocation failed."""
    return "RESOURCE_EXHAUSTED" in str(error)


def smaller(limits: Limits, buckets: Sequence[Bucket], failed: StepPlan) -> Limits | None:
    """`limits` under which no step needs the program of `failed`, but the next smaller one.

    None if there is no such program: it is the smallest of its kind already, or a staged prefill or
    a step that scores a prompt, whose sizes no limit changes.
    """
    if failed.staged is not None or any(c.scores_prompt for c in failed.portions):
        return None
    seqs, tokens = limits.max_num_seqs, limits.max_num_batched_tokens
    if all(portion.num_tokens == 1 for portion in failed.portions):
        seqs = _below(len(failed.portions), (b.seqs for b in buckets if b.decode))
    else:
        tokens = _below(failed.num_tokens, (b.tokens for b in buckets if not b.decode))
    if not seqs or not tokens:
        return None
    return Limits(
        min(seqs, tokens, limits.max_num_seqs),
        min(tokens, limits.max_num_batched_tokens),
        limits.max_model_len,
        limits.max_scored_tokens,
    )


def _below(size: int, rungs: Iterable[int]) -> int:
    """The rung below the one that holds `size`; 0 if there is none."""
    rungs = sorted(set(rungs))
    holding = next(rung for rung in rungs if rung >= size)
    return max((rung for rung in rungs if rung < holding), default=0)
