"""What a new context costs stored KV: Cache-Craft's arithmetic (arXiv 2502.15734, eq. 6 to 14).

`inter[l, j]` is the attention that a chunk's tokens paid to piece `j` in front of them in layer
`l`, `intra[l]` what they paid to each other; both in the mean over heads and summed over tokens.
"""

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Context(NamedTuple):
    """What a chunk stood behind when its KV was computed, and how it attended to it."""

    pieces: tuple[str, ...]  # in order, each name once (`named`)
    lengths: tuple[int, ...]  # tokens of each
    inter: np.ndarray  # f32[layers, pieces]
    intra: np.ndarray  # f32[layers]
    num_tokens: int  # of the chunk

    @property
    def impact(self) -> float:
        """The chunk context impact CCI (equations 9 to 11), in [0.5, 1)."""
        n, lengths = self.num_tokens, np.asarray(self.lengths, np.float64)
        a = (self.inter / (n * lengths)).sum(axis=1).mean() if self.pieces else 0.0
        b = float(self.intra.mean()) / n**2
        return 1 / (1 + math.exp(-min(float(a) / b, 700.0))) if b > 0 else 0.5


def named(names: Sequence[str]) -> tuple[str, ...]:
    """Names with their repetitions told apart, so that orders can be compared."""
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return tuple(out)


def overlap(old: Context, new: Sequence[str]) -> float:
    """The share beta of the attention to the old context that went to what is there again
    (equation 6). Without an old context: 1 if there is no new one either, else 0 (inferred: the
    paper leaves it open, and what was stored alone lacks all of the new context)."""
    weights = old.inter.mean(axis=0) if old.pieces else np.zeros(0)
    whole = float(weights.sum())
    if whole <= 0:
        return float(not new) if not old.pieces else float(set(old.pieces) <= set(new))
    there = np.isin(old.pieces, list(new))
    return float(weights[there].sum()) / whole


def disorder(old: Sequence[str], new: Sequence[str]) -> float:
    """The share gamma of pairs of common pieces that changed their order (equation 7): Kendall's
    distance; 0 for fewer than two."""
    place = {name: at for at, name in enumerate(new)}
    places = [place[name] for name in old if name in place]
    m = len(places)
    if m < 2:
        return 0.0
    swapped = sum(places[i] > places[j] for i in range(m) for j in range(i + 1, m))
    return swapped / (m * (m - 1) / 2)


def overhead(old: Context, new: Sequence[str]) -> float:
    """The cache fix overhead CFO for alpha = 1 (equations 8 and 12), in [0, 1]."""
    return old.impact * (1 - overlap(old, new) * (1 - disorder(old.pieces, new)))


def budget(shares: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Tokens of each chunk that are run again: `ceil(CFO * size)` (equation 14)."""
    return [math.ceil(round(share * size, 9)) for share, size in zip(shares, sizes, strict=True)]


def budget_within(overheads: Sequence[float], sizes: Sequence[int], most: int) -> list[int]:
    """The same, with overheads scaled by the alpha that runs `most` tokens in all, or all that lost
    something. Token by token, where each is due at some alpha; of equal ones the first chunk's."""
    counts = [0] * len(sizes)
    due = [(0.0, i) for i, cfo in enumerate(overheads) if cfo > 0]
    for _ in range(most):
        if not due:
            break
        _, i = heapq.heappop(due)
        counts[i] += 1
        if counts[i] < sizes[i]:
            heapq.heappush(due, (counts[i] / sizes[i] / overheads[i], i))
    return counts
