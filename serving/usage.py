"""What an answer took, in tokens."""

from collections.abc import Sequence as Seq
from typing import Any

from kvjax.request import RequestOutput


def usage(outputs: Seq[RequestOutput]) -> dict[str, Any]:
    """OpenAI's `usage`, summed over the prompts of one answer."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(o.num_cached_tokens for o in outputs)},
    }
