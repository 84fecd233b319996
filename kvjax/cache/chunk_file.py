"""Entries of arrays in one safetensors file, each with a checksum, under a header with another.

    8 bytes            length of the header
    header             JSON: what safetensors wants, and ours under "__metadata__" / "kvjax"
    arrays             of the entries, in order, without gaps
    "checksums"        u8[1 + entries, 16]: BLAKE2b of the first two lines, then of each entry

So whatever byte is damaged, either the file is refused or exactly the entry that it is in is. Any
reader of safetensors opens it; what its entries mean is the business of `kvjax.chunk_saving`.
"""

import dataclasses
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from kvjax.errors import CorruptChunks

FORMAT, VERSION = "kvjax chunks", 2
_CHECKSUM = 16  # bytes
_MAX_HEADER = 100_000_000  # bytes; what safetensors itself allows
_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8), "U64": np.dtype(np.uint64), "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """What is to be written: values of JSON, and arrays that are asked for one entry at a time."""

    fields: Mapping[str, Any]
    shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]]
    read: Callable[[], Arrays]  # of exactly these shapes


def write(path: Path, about: Mapping[str, Any], entries: Sequence[Entry]) -> int:
    """Writes a file in place of an older one, whole or not at all; its bytes.

    Raises:
      ValueError: an array is of a type that safetensors has not, or the header grows too large.
      OSError: there is no such folder, or the disk is full.
    """
    head = _header(about, entries)
    digests = [_digest(head)]
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(head)
            for entry in entries:
                arrays, digest = entry.read(), hashlib.blake2b(digest_size=_CHECKSUM)
                for key, (dtype, shape) in entry.shapes.items():
                    array = arrays[key]
                    assert (array.dtype, array.shape) == (dtype, shape), (key, dtype, shape)
                    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
                    file.write(data)
                    digest.update(data)
                digests.append(digest.digest())
            file.write(b"".join(digests))
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    return size


class ChunkFile:
    """A file that was written so, opened for reading. Use it in a `with`.

    Raises, when it is opened:
      CorruptChunks: it is no such file, or damaged where that concerns every entry.
      FileNotFoundError: there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] = path.open("rb")
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> None:
        total = os.fstat(self._file.fileno()).st_size
        prefix = self._file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, total - 8):
            raise CorruptChunks(f"{self.path} ({total} bytes) holds no saved chunks")
        head = self._file.read(length)
        try:
            tensors = json.loads(head)
            ours = json.loads(tensors.pop("__metadata__")["kvjax"])
            form, version = ours["format"], ours["version"]
            self.about: dict[str, Any] = ours["about"]
            self.entries: list[dict[str, Any]] = ours["entries"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptChunks(f"{self.path}: the header is damaged ({error})") from error
        if form != FORMAT or version != VERSION:
            raise CorruptChunks(
                f"{self.path} is {form!r} version {version!r}; wanted {FORMAT!r} version {VERSION}"
            )
        if not isinstance(self.entries, list):
            raise CorruptChunks(f"{self.path}: the header is damaged (no list of entries)")
        self._start = 8 + length
        size = _CHECKSUM * (1 + len(self.entries))
        self._file.seek(max(0, total - size))
        digests = self._file.read(size)
        self._digests = [digests[i : i + _CHECKSUM] for i in range(0, size, _CHECKSUM)]
        if self._digests[0] != _digest(prefix + head):
            raise CorruptChunks(f"{self.path}: the header does not fit its checksum")
        last = tensors["checksums"]["data_offsets"][1]  # the header is sound from here on
        if self._start + last != total:
            raise CorruptChunks(
                f"{self.path} has {total} bytes, its header says {self._start + last}"
            )
        self._arrays: list[dict[str, Any]] = [{} for _ in self.entries]
        for name, tensor in tensors.items():
            number, _, key = name.partition(".")
            if key:
                self._arrays[int(number)][key] = tensor

    def shapes(self, number: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Types and shapes of an entry's arrays."""
        return {
            key: (_DTYPES[tensor["dtype"]], tuple(tensor["shape"]))
            for key, tensor in self._arrays[number].items()
        }

    def read(self, number: int) -> dict[str, np.ndarray] | None:
        """Arrays of an entry; None if what is stored does not fit its checksum."""
        digest, found = hashlib.blake2b(digest_size=_CHECKSUM), {}
        for key, (dtype, shape) in self.shapes(number).items():
            start, stop = self._arrays[number][key]["data_offsets"]
            self._file.seek(self._start + start)
            data = self._file.read(stop - start)
            digest.update(data)
            if len(data) != stop - start:
                return None
            found[key] = np.frombuffer(bytearray(data), np.uint8).view(dtype).reshape(shape)
        return found if digest.digest() == self._digests[1 + number] else None

    def __enter__(self) -> "ChunkFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def _header(about: Mapping[str, Any], entries: Sequence[Entry]) -> bytes:
    """The length and the header: sizes are known before any array is read."""
    ours = {
        "format": FORMAT, "version": VERSION, "about": about,
        "entries": [entry.fields for entry in entries],
    }  # fmt: skip
    tensors: dict[str, Any] = {"__metadata__": {"kvjax": json.dumps(ours, separators=(",", ":"))}}
    at = 0

    def add(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        nonlocal at
        if dtype not in _NAMES:
            raise ValueError(f"{name} is of type {dtype}, which cannot be saved")
        stop = at + dtype.itemsize * int(np.prod(shape))
        tensors[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (at, stop)}
        at = stop

    for number, entry in enumerate(entries):
        for key, (dtype, shape) in entry.shapes.items():
            add(f"{number}.{key}", dtype, shape)
    add("checksums", np.dtype(np.uint8), (1 + len(entries), _CHECKSUM))
    head = json.dumps(tensors, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    if len(head) > _MAX_HEADER:
        raise ValueError(f"{len(entries)} entries need a header of {len(head)} bytes; at most "
                         f"{_MAX_HEADER} can be read")  # fmt: skip
    return struct.pack("<Q", len(head)) + head


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_CHECKSUM).digest()
