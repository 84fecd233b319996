"""Views of a checkpoint's tensors under other names; nothing is read until it is asked for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from kvjax.errors import CorruptWeights

Tensors = Mapping[str, np.ndarray]


class _View(Mapping[str, np.ndarray]):
    """Name -> array through one reader per name."""

    def __init__(self, readers: dict[str, Callable[[], np.ndarray]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> np.ndarray:
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def renamed(tensors: Tensors, rename: Callable[[str], str]) -> Tensors:
    """Every tensor of the checkpoint, under `rename(its name)`."""
    return _View({rename(name): partial(tensors.__getitem__, name) for name in tensors})


def split_rows(tensors: Tensors, parts: Mapping[str, Sequence[tuple[str, int]]]) -> Tensors:
    """`tensors`, where those in `parts` are cut along their rows: `{stored: [(name, rows), ...]}`.

    Raises:
      CorruptWeights: when read, if the rows of the parts are not those of the stored tensor.
    """
    readers = {name: partial(tensors.__getitem__, name) for name in tensors if name not in parts}
    for stored, pieces in parts.items():
        stops = np.cumsum([rows for _, rows in pieces]).tolist()
        for (name, rows), stop in zip(pieces, stops, strict=True):
            readers[name] = partial(_rows, tensors, stored, stop - rows, stop, stops[-1])
    return _View(readers)


def _rows(tensors: Tensors, stored: str, start: int, stop: int, total: int) -> np.ndarray:
    tensor = tensors[stored]
    if len(tensor) != total:
        raise CorruptWeights(
            f"tensor {stored!r} has {len(tensor)} rows, the configuration implies {total}"
        )
    return tensor[start:stop]
