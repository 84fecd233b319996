"""Runs of tokens cut into pieces of few compiled sizes, so that no length needs a program more."""

from collections.abc import Iterator

import numpy as np

PIECE_SIZES = (128, 512)  # tokens of a program that moves, reads, exports or imports KV
LARGE_MOVE = 2048  # tokens of one more that moves: a call of a program costs what 100 tokens do


def pieces(count: int, large: int | None = None) -> Iterator[tuple[slice, int]]:
    """Consecutive parts of `range(count)`, and the size that each is padded to. One of `large`
    tokens is half full at least."""
    first, most = 0, PIECE_SIZES[-1]
    while first < count:
        left = count - first
        if large is not None and 2 * left >= large:
            size = large
        else:
            size = next((size for size in PIECE_SIZES if size >= left), most)
        part = slice(first, min(first + size, count))
        yield part, size
        first = part.stop


def padded_slots(slots: np.ndarray, size: int) -> np.ndarray:
    """Slots, i32, with padding behind them."""
    return np.pad(slots.astype(np.int32), (0, size - len(slots)), constant_values=-1)
