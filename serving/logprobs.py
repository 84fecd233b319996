"""Log-probabilities as OpenAI's two endpoints write them."""

from collections.abc import Sequence as Seq
from typing import Any

from kvjax.models.tokenizers import Tokenizer
from kvjax.request import PositionLogprobs


def completion_logprobs(
    tokenizer: Tokenizer,
    token_ids: Seq[int],
    entries: Seq[PositionLogprobs | None],
    count: int,
    offset: int,
) -> dict[str, Any]:
    """Parallel lists for `/v1/completions`; `offset` is where the first token's text begins."""
    out: dict[str, list[Any]] = {
        "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
    }  # fmt: skip
    for token, entry in zip(token_ids, entries, strict=True):
        text = _text(tokenizer, token)
        out["tokens"].append(text)
        out["text_offset"].append(offset)
        offset += len(text)
        out["token_logprobs"].append(None if entry is None else entry[token].logprob)
        out["top_logprobs"].append(
            None if entry is None else {_text(tokenizer, i): p for i, p in _top(entry, count)}
        )
    return out


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Seq[int], entries: Seq[PositionLogprobs], count: int
) -> dict[str, Any]:
    """One object per token, for `/v1/chat/completions`."""
    return {
        "content": [
            {
                **_described(tokenizer, token, entry[token].logprob),
                "top_logprobs": [_described(tokenizer, i, p) for i, p in _top(entry, count)],
            }
            for token, entry in zip(token_ids, entries, strict=True)
        ]
    }


def prompt_logprobs(
    tokenizer: Tokenizer, entries: Seq[PositionLogprobs | None]
) -> list[dict[str, Any] | None]:
    """Per prompt token, by token id; the first token has none."""
    return [
        None
        if entry is None
        else {
            str(token): {
                "logprob": p.logprob,
                "rank": p.rank,
                "decoded_token": _text(tokenizer, token),
            }
            for token, p in entry.items()
        }
        for entry in entries
    ]


def _top(entry: PositionLogprobs, count: int) -> list[tuple[int, float]]:
    """The `count` most likely tokens, the most likely first."""
    ranked = sorted(entry.items(), key=lambda item: item[1].rank)
    return [(token, p.logprob) for token, p in ranked[:count]]


def _described(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {"token": _text(tokenizer, token), "logprob": logprob, "bytes": list(data)}


def _text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=False)
