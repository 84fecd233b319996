"""KVCOMM's arithmetic (arXiv 2510.12872, after the authors' code): how anchors speak for a message.

An anchor is a message whose KV is known alone and within a prompt; its offset is the difference.
KV is f32[layers, tokens, kv_heads, width] throughout.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Age(NamedTuple):
    """What decides which anchor of a pool leaves."""

    order: int  # of arrival
    uses: int


def softmax(distances: np.ndarray) -> np.ndarray:
    """Weights over the first axis, near ones weigh more."""
    shifted = np.exp(distances.min(axis=0, keepdims=True) - distances)
    return shifted / shifted.sum(axis=0, keepdims=True)


def gate_weights(distances: Sequence[float]) -> np.ndarray:
    """Weights of anchors by their L2 distances to a message."""
    return softmax(np.asarray(distances, np.float64))


def predictable(weights: np.ndarray, gamma: float) -> bool:
    """Whether anchors with these weights speak for a message: their entropy is at most `gamma` of
    what equal weights have. Fewer than two do not, and with a `gamma` of 0 none do."""
    if len(weights) < 2 or gamma == 0:
        return False
    sure = weights[weights > 0]
    entropy = float(-(sure * np.log2(sure)).sum())
    return entropy <= gamma * math.log2(len(weights))


def top_p(weights: np.ndarray, p: float) -> np.ndarray:
    """The fewest anchors whose weights add up to `p`, heaviest first."""
    order = np.argsort(-weights, kind="stable")
    count = int(np.searchsorted(np.cumsum(weights[order]), p - 1e-12)) + 1
    return order[:count]


def token_weights(
    base: np.ndarray, anchors: Sequence[np.ndarray], temperature: float
) -> np.ndarray:
    """Weights f64[anchors, tokens]: softmax of the mean absolute distance, token by token.

    Anchors are at least as long as `base`; tokens are aligned by index.
    """
    tokens = base.shape[1]
    distances = [
        np.abs(base - anchor[:, :tokens]).mean(axis=(0, 2, 3), dtype=np.float64)
        for anchor in anchors
    ]
    return softmax(np.stack(distances) / temperature)


def interpolated(weights: np.ndarray, offsets: Sequence[np.ndarray]) -> np.ndarray:
    """The weighted sum of offsets over anchors, without layer 0, where KV depends on the token
    alone."""
    tokens = weights.shape[1]
    total = np.zeros_like(offsets[0][:, :tokens])
    for weight, offset in zip(weights.astype(np.float32), offsets, strict=True):
        total += weight[None, :, None, None] * offset[:, :tokens]
    total[0] = 0
    return total


def leaves(pool: Sequence[Age], window: int) -> int:
    """Which one leaves a full pool: the least used of the `window` that came first; of equally
    used ones the oldest."""
    oldest = sorted(range(len(pool)), key=lambda i: pool[i].order)[:window]
    return min(oldest, key=lambda i: (pool[i].uses, pool[i].order))
