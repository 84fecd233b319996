"""Scores of one vocabulary's tokens carried to another's, by the bytes of text that they share
(CacheClip, arXiv 2510.10129, where a selector has a tokenizer of its own)."""

from collections.abc import Sequence

import numpy as np

from kvjax.models.tokenizers import Tokenizer

Tokens = tuple[int, ...]


def retokenised(ids: Sequence[int], ours: Tokenizer, theirs: Tokenizer) -> Tokens:
    """The text of `ids` as tokens of `theirs`; a character cut in two is one that nobody knows."""
    data = b"".join(ours.token_bytes(i) for i in ids)
    return tuple(theirs.encode(data.decode("utf-8", "replace"), add_special_tokens=False))


def edges(ids: Sequence[int], tokenizer: Tokenizer) -> np.ndarray:
    """Where in the text each token begins, and where the last one ends: bytes, i64[n + 1]."""
    return np.cumsum([0, *(len(tokenizer.token_bytes(i)) for i in ids)], dtype=np.int64)


def carried(scores: np.ndarray, theirs: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """For each of our tokens the highest score of those it shares a byte with, 0 for none.

    `theirs` and `ours` are `edges` of one text. A tokenizer may add a byte or change some: their
    places are then stretched to our length.
    """
    if len(scores) == 0 or not theirs[-1]:
        return np.zeros(len(ours) - 1, np.float32)
    places = theirs * (ours[-1] / theirs[-1])
    # Token j of theirs shares a byte with [a, b) where its start is below b and its end above a.
    first = np.searchsorted(places[1:], ours[:-1] + 1e-9, side="right")
    last = np.searchsorted(places[:-1], ours[1:] - 1e-9, side="left")
    out = np.zeros(len(ours) - 1, np.float32)
    for token, (i, j) in enumerate(zip(first, last, strict=True)):
        if i < j and ours[token] < ours[token + 1]:
            out[token] = scores[i:j].max()
    return out
