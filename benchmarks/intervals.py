"""Paired bootstrap intervals: the same resampled items for everything that is compared.

Percentile intervals (Efron 1979) over items. All of it is seeded: the same readings give the same
interval.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES, SEED, LEVEL = 10_000, 0, 0.95
Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """A statistic of all items and the bounds of its interval; nan where it is undefined."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 3, scale: float = 1.0) -> str:
        """`value [low, high]`, or `-` if undefined; bounds equal to the value are left out."""
        if not np.isfinite(self.value):
            return "-"
        value, low, high = (f"{scale * x:.{digits}f}" for x in (self.value, self.low, self.high))
        return value if value == low == high else f"{value} [{low}, {high}]"


@functools.lru_cache(maxsize=8)
def resampled(num_items: int, resamples: int = RESAMPLES, seed: int = SEED) -> Array:
    """How often each item is drawn, [resamples, num_items]: with replacement, `num_items` in all.

    The same for the same arguments; do not write to it.
    """
    if num_items < 1 or resamples < 1:
        raise ValueError(f"expected items and resamples, got {num_items} and {resamples}")
    draws = np.random.default_rng(seed).integers(num_items, size=(resamples, num_items))
    draws += np.arange(resamples)[:, None] * num_items
    counts = np.bincount(draws.ravel(), minlength=resamples * num_items)
    counts = counts.reshape(resamples, num_items).astype(np.float64)
    counts.flags.writeable = False
    return counts


def mean(values: Sequence[float], **how: int) -> Interval:
    """Mean over items."""
    return statistic(lambda row: row, values, **how)


def difference(a: Sequence[float], b: Sequence[float], **how: int) -> Interval:
    """mean(a) - mean(b) over the same items, in the same order."""
    return statistic(np.subtract, a, b, **how)


def recovery(method: Sequence[float], naive: Sequence[float], **how: int) -> Interval:
    """1 - mean(method) / mean(naive): 1 is as good as nothing lost, 0 no better than naive.

    Undefined (nan) where naive loses nothing at all; resamples in which it does are left out.
    """

    def share(mean_method: Array, mean_naive: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(mean_naive != 0, 1 - mean_method / mean_naive, np.nan)

    return statistic(share, method, naive, **how)


def statistic(
    of_means: Callable[..., Array],
    *rows: Sequence[float],
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """Interval of a function of the rows' means, each row over the same items in the same order.

    `of_means` gets one array per row and works elementwise. Raises `ValueError` for rows of
    different lengths, no items, or values that are not finite.
    """
    table = _table(rows)
    means = table @ resampled(table.shape[1], resamples, seed).T / table.shape[1]
    return _interval(of_means(*table.mean(axis=-1, keepdims=True)), of_means(*means))


def unpaired_difference(
    a: Sequence[float], b: Sequence[float], *, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval:
    """mean(a) - mean(b) over different items, each resampled for itself."""
    row_a, row_b = _table([a])[0], _table([b])[0]
    means_a = resampled(len(row_a), resamples, seed) @ row_a / len(row_a)
    means_b = resampled(len(row_b), resamples, seed + 1) @ row_b / len(row_b)
    return _interval(np.array([row_a.mean() - row_b.mean()]), means_a - means_b)


def _table(rows: Sequence[Sequence[float]]) -> Array:
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"expected rows over the same items, got {[len(row) for row in rows]}")
    table = np.asarray(rows, np.float64)
    if not np.isfinite(table).all():
        raise ValueError("a value is not finite")
    return table


def _interval(value: Array, resampled_values: Array) -> Interval:
    defined = resampled_values[~np.isnan(resampled_values)]
    if not len(defined) or np.isnan(value[0]):
        return Interval(float("nan"), float("nan"), float("nan"))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(float(value[0]), float(low), float(high))
