"""What an answer took, in tokens."""

from collections.abc import Sequence as Seq
from typing import Any

from kvjax.request import RequestOutput
from kvjax.reuse.report import ReuseReport


def usage(outputs: Seq[RequestOutput]) -> dict[str, Any]:
    """OpenAI's `usage`, summed over the prompts of one answer.

    A prompt with chunks also has counts of what became of them, averaged over the layers.
    """
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    details = {"cached_tokens": sum(output.num_cached_tokens for output in outputs)}
    reports: list[ReuseReport] = [o.reuse for o in outputs if o.reuse is not None]
    if reports:
        details |= {
            f"{fate}_tokens": round(sum(getattr(report, fate) for report in reports))
            for fate in ("shifted", "patched", "recomputed")
        }
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": details,
    }
