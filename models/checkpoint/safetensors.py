"""A Hugging Face folder: `config.json` with `model.safetensors`, whole or in indexed shards.

The container is read here rather than by its library: offsets are checked against the file's size
before anything is loaded, and bfloat16 and float8 come as `ml_dtypes` under any library version.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kvjax.errors import CorruptWeights, UnsupportedModel
from kvjax.models.checkpoint.tensors import Extent, TensorMap, fingerprint

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class SafetensorsCheckpoint:
    """See `kvjax.models.checkpoint.Checkpoint`."""

    path: Path
    config: dict[str, Any]
    tensors: TensorMap
    fingerprint: str
    format: str = "safetensors"

    @property
    def folder(self) -> Path:
        """The folder itself."""
        return self.path


def detects(path: Path) -> bool:
    """Whether `path` is a folder with `config.json` and weights in this format."""
    return (path / "config.json").is_file() and any(
        (path / name).is_file() for name in (_SINGLE, _INDEX)
    )


def open(path: Path) -> SafetensorsCheckpoint:
    """Opens the folder; every shard is there, and as long as its header says, afterwards."""
    config = _read_json(path / "config.json")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unnamed")
        raise UnsupportedModel(f"{path}: weights quantised by {method!r} cannot be read")
    headers, entries = [], {}
    for shard, names in _shards(path).items():
        header, found = _read_header(shard)
        headers.append(header)
        for name in found if names is None else names:
            if name not in found:
                raise CorruptWeights(f"{shard}: tensor {name!r} is in the index but not in here")
            entries[name] = found[name]
    return SafetensorsCheckpoint(
        path=path,
        config=config,
        tensors=TensorMap(
            {name: functools.partial(_read, *entry) for name, entry in entries.items()}, path
        ),
        fingerprint=fingerprint(config, headers, [extent for extent, _, _ in entries.values()]),
    )


def _shards(path: Path) -> dict[Path, list[str] | None]:
    """Files to read, each with the tensors wanted from it; None is all of them."""
    if (path / _SINGLE).is_file():
        return {path / _SINGLE: None}
    weight_map = _read_json(path / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptWeights(f"{path / _INDEX}: no weight_map")
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise CorruptWeights(f"{path / _INDEX}: a weight_map whose values are no file names")
    shards: dict[Path, list[str] | None] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise CorruptWeights(f"{path / _INDEX}: shard {file!r} is not a plain file name")
        if not (path / file).is_file():
            raise CorruptWeights(f"{path}: shard {file} is in the index but not in the folder")
        shards[path / file] = [name for name, where in weight_map.items() if where == file]
    return shards


def _read_header(file: Path) -> tuple[bytes, dict[str, tuple[Extent, str, tuple[int, ...]]]]:
    """Header bytes and, by name, (extent, type, shape) of each tensor."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CorruptWeights(f"{file}: {size} bytes are too few for a header of {length}")
        header = stream.read(length)
    try:
        table = json.loads(header)
    except ValueError as error:
        raise CorruptWeights(f"{file}: the header is not JSON ({error})") from error
    if not isinstance(table, dict):
        raise CorruptWeights(f"{file}: the header is not a table")
    table.pop("__metadata__", None)
    entries = {}
    for name, entry in table.items():
        try:
            start, stop = entry["data_offsets"]
            kind, shape = entry["dtype"], tuple(entry["shape"])
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptWeights(f"{file}: malformed entry for {name!r}: {entry}") from error
        if kind not in _DTYPES:
            raise UnsupportedModel(f"{file}: tensor {name!r} has type {kind}, which is not read")
        wanted = math.prod(shape) * _DTYPES[kind].itemsize
        if start < 0 or stop - start != wanted:
            raise CorruptWeights(f"{file}: {name!r} {kind}{shape} has {stop - start} bytes")
        if 8 + length + stop > size:
            raise CorruptWeights(
                f"{file}: truncated, {name!r} ends at byte {8 + length + stop} of {size}"
            )
        entries[name] = (Extent(file, 8 + length + start, wanted), kind, shape)
    return header, entries


def _read(extent: Extent, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    return extent.read().view(_DTYPES[kind]).reshape(shape)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptWeights(f"{file}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CorruptWeights(f"{file}: not a table")
    return value
