"""A folder written by `kvjax convert`: `kvjax_checkpoint.json` beside the arrays Orbax stored.

The arrays have Hugging Face's names and one float type, so that any weight type and any mesh can be
loaded from them. They lie in parts, each an Orbax checkpoint of its own; the manifest knows every
part's tensors with a checksum, and its files with their sizes.
"""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.errors import CorruptWeights
from kvjax.models.checkpoint.tensors import TensorMap

MANIFEST = "kvjax_checkpoint.json"


@dataclasses.dataclass(frozen=True)
class OrbaxCheckpoint:
    """See `kvjax.models.checkpoint.Checkpoint`."""

    path: Path
    config: dict[str, Any]  # the manifest's "config": the config.json that was converted
    tensors: TensorMap
    fingerprint: str
    format: str = "orbax"

    @property
    def folder(self) -> Path:
        """The folder itself; tokenizer files were copied into it."""
        return self.path


def detects(path: Path) -> bool:
    """Whether `path` is a folder with the manifest."""
    return (path / MANIFEST).is_file()


def open(path: Path) -> OrbaxCheckpoint:
    """Opens the folder by its manifest; every file is there and as long as it was written.

    The manifest's "fingerprint" is that of the weights it was made from if no value changed, so
    that a converted model shares its stored KV with the original.
    """
    text = (path / MANIFEST).read_text(encoding="utf-8")
    readers: dict[str, Callable[[], np.ndarray]] = {}
    try:
        manifest = json.loads(text)
        config = dict(manifest["config"])
        fingerprint = manifest.get("fingerprint") or hashlib.sha256(text.encode()).hexdigest()
        for name, entry in dict(manifest.get("parts", {})).items():
            _check_files(path / name, entry["files"])
            part = _Part(path / name, entry["tensors"])
            readers |= {tensor: part.reader(tensor) for tensor in entry["tensors"]}
        for name, (shape, dtype) in dict(manifest.get("empty", {})).items():
            readers[name] = _empty(tuple(shape), np.dtype(dtype))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CorruptWeights):
            raise
        raise CorruptWeights(f"{path / MANIFEST}: malformed ({error!r})") from error
    return OrbaxCheckpoint(path, config, TensorMap(readers, path), fingerprint)


def checksum(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def file_sizes(part: Path) -> dict[str, int]:
    """Relative path -> bytes of every file below `part`."""
    files = sorted(file for file in part.rglob("*") if file.is_file())
    return {file.relative_to(part).as_posix(): file.stat().st_size for file in files}


def _check_files(part: Path, files: dict[str, int]) -> None:
    for name, size in files.items():
        file = part / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise CorruptWeights(f"{file} {state}")


class _Part:
    """One stored tree. Read whole when first asked; what nobody has asked for yet is kept."""

    def __init__(self, path: Path, checksums: dict[str, int]) -> None:
        self._path, self._checksums = path, dict(checksums)
        self._ready: dict[str, np.ndarray] = {}

    def reader(self, name: str) -> Callable[[], np.ndarray]:
        """What `TensorMap` calls for tensor `name`."""

        def read() -> np.ndarray:
            if name not in self._ready:
                self._ready = self._restore()
            array = self._ready.pop(name)
            if checksum(array) != self._checksums[name]:
                raise CorruptWeights(f"{self._path}: tensor {name!r} has another checksum")
            return array

        return read

    def _restore(self) -> dict[str, np.ndarray]:
        import orbax.checkpoint as ocp  # slow to import, and few runs need it

        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in self._checksums}
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                args = ocp.args.PyTreeRestore(restore_args=as_numpy)
                tree = checkpointer.restore(self._path.absolute(), args=args)
        except Exception as error:  # Orbax and TensorStore raise many types
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CorruptWeights(f"{self._path}: cannot be read ({why})") from error
        if missing := self._checksums.keys() - tree.keys():
            raise CorruptWeights(f"{self._path}: tensor {min(missing)!r} is missing")
        return {name: np.asarray(tree[name]) for name in self._checksums}


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> Callable[[], np.ndarray]:
    """Reader of an array without elements, which Orbax does not store."""
    return lambda: np.empty(shape, dtype)
