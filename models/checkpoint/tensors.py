"""Tensors that stay in their files until they are asked for, and what identifies them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvjax.errors import CorruptWeights

_SAMPLE_BYTES = 256


class TensorMap(Mapping[str, np.ndarray]):
    """Name -> array; every access calls that tensor's reader anew."""

    def __init__(self, readers: dict[str, Callable[[], np.ndarray]], source: Path) -> None:
        self._readers = readers
        self._source = source

    def __getitem__(self, name: str) -> np.ndarray:
        """The array, read now. Raises `CorruptWeights` (not `KeyError`) if there is none."""
        if name not in self._readers:
            raise CorruptWeights(f"{self._source}: tensor {name!r} is missing")
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def get(self, name: str, default: Any = None) -> Any:
        """The array, or `default` if there is none."""
        return self[name] if name in self._readers else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


class Extent(NamedTuple):
    """Where one tensor's bytes lie."""

    path: Path
    offset: int  # bytes from the start of the file
    num_bytes: int

    def read(self) -> np.ndarray:
        """The bytes, uint8 [num_bytes], in memory of their own (so the file may go away)."""
        data = np.fromfile(self.path, np.uint8, count=self.num_bytes, offset=self.offset)
        if len(data) != self.num_bytes:
            raise CorruptWeights(
                f"{self.path}: wanted {self.num_bytes} bytes at {self.offset}, got {len(data)}"
            )
        return data


def fingerprint(config: dict[str, Any], headers: Iterable[bytes], extents: list[Extent]) -> str:
    """Digest of config, headers (names, types, shapes) and the middle of every tensor.

    Headers alone would not do: a fine-tuned model has those of its base. A change confined to
    bytes that are not sampled goes unnoticed.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for header in headers:
        digest.update(len(header).to_bytes(8, "little") + header)
    by_path: dict[Path, list[Extent]] = {}
    for extent in extents:
        by_path.setdefault(extent.path, []).append(extent)
    for path in sorted(by_path):
        with path.open("rb", buffering=0) as file:
            for extent in sorted(by_path[path]):
                length = min(_SAMPLE_BYTES, extent.num_bytes)
                file.seek(extent.offset + (extent.num_bytes - length) // 2)
                digest.update(file.read(length))
    return digest.hexdigest()
