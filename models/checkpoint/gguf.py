"""A `.gguf` file: header, size check, tensors dequantised and put back into Hugging Face's order.

The header is parsed here: the library's reader takes seconds over a vocabulary. Its tables and its
dequantisation are used as they are.
"""

import dataclasses
import functools
import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from kvjax.errors import CorruptWeights, UnsupportedModel
from kvjax.models.checkpoint.gguf_config import hugging_face_config
from kvjax.models.checkpoint.gguf_names import hugging_face_name, hugging_face_values
from kvjax.models.checkpoint.tensors import Extent, TensorMap, fingerprint

_LENGTH = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4",
    6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GGUFCheckpoint:
    """See `kvjax.models.checkpoint.Checkpoint`. All tensors come as float32."""

    path: Path
    config: dict[str, Any]
    tensors: TensorMap
    fingerprint: str
    metadata: dict[str, Any]  # the file's own keys, "tokenizer.ggml.*" among them
    format: str = "gguf"

    @property
    def folder(self) -> Path:
        """The folder that the file lies in."""
        return self.path.parent


@dataclasses.dataclass(frozen=True)
class _Stored:
    """One tensor as the file has it."""

    extent: Extent
    type: GGMLQuantizationType
    shape: tuple[int, ...]  # outermost first


class _Info(NamedTuple):
    """What the header says of one tensor."""

    name: str
    shape: tuple[int, ...]  # outermost first
    type: int
    offset: int  # from the start of the data


def detects(path: Path) -> bool:
    """Whether `path` is a `.gguf` file, or a folder with exactly one."""
    return _file_of(path) is not None


def open(path: Path) -> GGUFCheckpoint:
    """Opens the file; it is as long as its header says afterwards."""
    file = _file_of(path)
    assert file is not None, "detects() said so"
    header, metadata, stored = _read_header(file)
    if metadata.get("split.count", 0) not in (0, 1):
        raise UnsupportedModel(f"{file}: one part of a split file; merge the parts first")
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    try:
        config = hugging_face_config(file, metadata, shapes, lambda name: _read(stored[name]))
    except (TypeError, ArithmeticError, LookupError) as error:
        raise CorruptWeights(f"{file}: metadata of a wrong type or size ({error})") from error
    architecture = metadata["general.architecture"]
    readers = {}
    for name, tensor in stored.items():
        if (target := hugging_face_name(architecture, name)) is not None:
            readers[target] = functools.partial(_read_as_hf, tensor, architecture, name, config)
    return GGUFCheckpoint(
        path=file,
        config=config,
        tensors=TensorMap(readers, file),
        fingerprint=fingerprint(config, [header], [tensor.extent for tensor in stored.values()]),
        metadata=metadata,
    )


def _file_of(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    files = list(path.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def _read(tensor: _Stored) -> np.ndarray:
    """The tensor as float32, as the file has it."""
    block, block_bytes = GGML_QUANT_SIZES[tensor.type]
    *outer, inner = tensor.shape
    data = tensor.extent.read().reshape(*outer, inner // block * block_bytes)
    try:
        return dequantize(data, tensor.type)
    except NotImplementedError as error:
        raise UnsupportedModel(
            f"{tensor.extent.path}: type {tensor.type.name} cannot be dequantised"
        ) from error


def _read_as_hf(
    tensor: _Stored, architecture: str, name: str, config: dict[str, Any]
) -> np.ndarray:
    return hugging_face_values(architecture, name, _read(tensor), config)


def _read_header(file: Path) -> tuple[bytes, dict[str, Any], dict[str, _Stored]]:
    """The header's bytes, its metadata and, by the file's own names, its tensors."""
    size = file.stat().st_size
    if size < 24:
        raise CorruptWeights(f"{file}: {size} bytes are no GGUF file")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise CorruptWeights(f"{file}: not a GGUF file (starts with {data[:4]!r})")
        cursor = _Cursor(data)
        cursor.position = 4
        version = cursor.unpack("<I")
        if version not in (2, 3):
            raise UnsupportedModel(f"{file}: GGUF version {version} (or big-endian) is not read")
        num_tensors, num_keys = cursor.unpack("<Q"), cursor.unpack("<Q")
        try:
            metadata = dict(_read_entry(cursor) for _ in range(num_keys))
            infos = [_read_info(cursor) for _ in range(num_tensors)]
        except (struct.error, ValueError, KeyError, IndexError, OverflowError) as error:
            raise CorruptWeights(f"{file}: header cut off or malformed ({error})") from error
        header = data[: cursor.position]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise CorruptWeights(f"{file}: alignment {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    stored = {info.name: _locate(file, size, start, info) for info in infos}
    return header, metadata, stored


def _locate(file: Path, size: int, start: int, info: _Info) -> _Stored:
    """Where the tensor lies, `start` being where the data begin, and that it is all there."""
    try:
        kind = GGMLQuantizationType(info.type)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(f"{file}: {info.name!r} has unknown type {info.type}") from error
    if not info.shape or info.shape[-1] % block:
        raise CorruptWeights(
            f"{file}: {info.name!r} {info.shape} is not made of {kind.name} blocks"
        )
    num_bytes = math.prod(info.shape) // block * block_bytes
    extent = Extent(file, start + info.offset, num_bytes)
    if extent.offset + extent.num_bytes > size:
        end = extent.offset + extent.num_bytes
        raise CorruptWeights(f"{file}: truncated, {info.name!r} ends at byte {end} of {size}")
    return _Stored(extent, kind, info.shape)


class _Cursor:
    """Reads forward through the header; past the end is `struct.error` or `ValueError`."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position = data, 0

    def unpack(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self.data, self.position)
        self.position += struct.calcsize(layout)
        return value

    def string(self) -> str:
        (length,) = _LENGTH.unpack_from(self.data, self.position)
        start = self.position + 8
        self.position = start + length
        if self.position > len(self.data):
            raise ValueError(f"a string of {length} bytes at {start}")
        return self.data[start : self.position].decode("utf-8", "surrogateescape")

    def numbers(self, layout: str, count: int) -> list[Any]:
        values = np.frombuffer(self.data, layout, count, self.position).tolist()
        self.position += count * np.dtype(layout).itemsize
        return values


def _read_entry(cursor: _Cursor) -> tuple[str, Any]:
    return cursor.string(), _read_value(cursor, cursor.unpack("<I"))


def _read_value(cursor: _Cursor, kind: int) -> Any:
    if kind == _STRING:
        return cursor.string()
    if kind != _ARRAY:
        return cursor.numbers(_SCALARS[kind], 1)[0]
    kind, count = cursor.unpack("<I"), cursor.unpack("<Q")
    if kind == _STRING:
        return [cursor.string() for _ in range(count)]
    return cursor.numbers(_SCALARS[kind], count)


def _read_info(cursor: _Cursor) -> _Info:
    name = cursor.string()
    shape = cursor.numbers("<u8", cursor.unpack("<I"))  # innermost first
    return _Info(name, tuple(reversed(shape)), cursor.unpack("<I"), cursor.unpack("<Q"))
