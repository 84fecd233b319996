"""How far two outcomes are apart: distributions, tokens, sets, orders. All in float64.

Logits are [*rows, vocab]; what is ranked is one row of finite numbers.
"""

from collections.abc import Sequence, Set

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def log_softmax(logits: ArrayLike) -> Array:
    """Natural log-probabilities per row; -inf is a token that cannot come."""
    rows = np.asarray(logits, np.float64)
    top = rows.max(axis=-1, keepdims=True)
    if not np.isfinite(top).all():
        raise ValueError("a row of logits has no finite maximum")
    shifted = rows - top
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl_divergence(reference: ArrayLike, other: ArrayLike) -> Array:
    """KL(softmax(reference) || softmax(other)) per row, in nats; never negative.

    inf where `other` excludes a token that `reference` may draw.
    """
    log_p, log_q = log_softmax(reference), log_softmax(other)
    if log_p.shape != log_q.shape:
        raise ValueError(f"expected logits of one shape, got {log_p.shape} and {log_q.shape}")
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    return np.maximum(terms.sum(axis=-1), 0.0)  # equal rows may sum to minus an ulp


def same_top(reference: ArrayLike, other: ArrayLike) -> NDArray[np.bool_]:
    """Whether both rows have their maximum at the same token (the first, if it is shared)."""
    return np.argmax(np.asarray(reference), axis=-1) == np.argmax(np.asarray(other), axis=-1)


def agreement(reference: Sequence[int], other: Sequence[int]) -> float:
    """Share of the reference's tokens that `other` has at the same place; 1 for none."""
    if not reference:
        return 1.0
    return sum(a == b for a, b in zip(reference, other, strict=False)) / len(reference)


def jaccard(a: Set[int], b: Set[int]) -> float:
    """Size of the intersection over that of the union; 1 for two empty sets."""
    union = len(a | b)
    return len(a & b) / union if union else 1.0


def jaccard_by_chance(share: float) -> float:
    """What two independent random sets reach that each hold `share` of very many tokens."""
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    return share / (2 - share)


def ranks(values: ArrayLike) -> Array:
    """Ranks from 1; equal values share the mean of theirs."""
    row = _finite(values)
    below = (row[None, :] < row[:, None]).sum(axis=1)
    equal = (row[None, :] == row[:, None]).sum(axis=1)
    return below + (equal + 1) / 2


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation, ties by mean ranks; nan if either is constant."""
    rank_a, rank_b = ranks(a), ranks(b)
    _same_length(rank_a, rank_b)
    return _correlation(rank_a - rank_a.mean(), rank_b - rank_b.mean())


def kendall_tau(a: ArrayLike, b: ArrayLike) -> float:
    """Kendall's tau-b: concordant less discordant pairs, ties set apart; nan if one is constant."""
    row_a, row_b = _finite(a), _finite(b)
    _same_length(row_a, row_b)
    above = np.triu_indices(len(row_a), 1)
    signs_a = np.sign(row_a[:, None] - row_a[None, :])[above]
    signs_b = np.sign(row_b[:, None] - row_b[None, :])[above]
    return _correlation(signs_a, signs_b)


def _correlation(a: Array, b: Array) -> float:
    """Cosine of the angle between two vectors; nan if one is zero."""
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else float("nan")


def _finite(values: ArrayLike) -> Array:
    row = np.asarray(values, np.float64)
    if row.ndim != 1 or not np.isfinite(row).all():
        raise ValueError(f"expected one row of finite numbers, got shape {row.shape}")
    return row


def _same_length(a: Array, b: Array) -> None:
    if len(a) != len(b):
        raise ValueError(f"expected equally many values, got {len(a)} and {len(b)}")
