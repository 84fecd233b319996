"""Runs of tokens cut into pieces of two compiled sizes, so that no length needs a program more."""

from collections.abc import Iterator

import numpy as np

PIECE_SIZES = (128, 512)  # tokens of a program that moves, reads, exports or imports KV


def pieces(count: int) -> Iterator[tuple[slice, int]]:
    """Consecutive parts of `range(count)`, and the size that each is padded to."""
    most = PIECE_SIZES[-1]
    for first in range(0, count, most):
        part = slice(first, min(first + most, count))
        yield part, next(size for size in PIECE_SIZES if size >= part.stop - part.start)


def padded_slots(slots: np.ndarray, size: int) -> np.ndarray:
    """Slots, i32, with padding behind them."""
    return np.pad(slots.astype(np.int32), (0, size - len(slots)), constant_values=-1)
