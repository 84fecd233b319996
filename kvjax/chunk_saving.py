"""Stored chunks in a file and back: what they are, for whom they hold, and their KV bit for bit.

A variant is saved with its tokens, provenance, scores and everything that strategies keep with it;
of its pages only the KV of its own tokens, so that it can be loaded into pages of any size. What
is on the host alone has none.

Cache salts are secrets. A file has a slow hash of each, keyed by a number of its own: it tells
whether a salt that somebody names is the one, and nothing else.
"""

import dataclasses
import hashlib
import json
import logging
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvjax import reuse
from kvjax.cache import chunk_file
from kvjax.cache.chunk_file import ChunkFile, Entry
from kvjax.cache.chunks import Variant, VariantKey, tokens_hash
from kvjax.cache.pages import KVSpec
from kvjax.errors import CorruptChunks, ForeignChunks
from kvjax.models import ModelConfig
from kvjax.pallas_kernels.page_ops import KVSpan
from kvjax.transfer import Spans, empty_span

log = logging.getLogger("kvjax")

_SPAN_PARTS = KVSpan._fields
_SALT_KEY = "salt_key"
_RESIZED = ("dynamic", "longrope")  # scalings whose angles depend on the longest length allowed


def identity(
    fingerprint: str, weights: str, config: ModelConfig, spec: KVSpec, max_model_len: int,
    tokenizer: str,
) -> dict[str, Any]:  # fmt: skip
    """What stored KV holds for, in values of JSON. Page sizes and layouts are not part of it."""

    def rotary(rope: Any) -> dict[str, Any] | None:
        if rope is None:
            return None
        length = max_model_len if rope.scaling in _RESIZED else None
        return {**dataclasses.asdict(rope), "num_positions": length}

    found = {
        "model": fingerprint,
        "weights": weights,
        "kv_dtype": spec.groups[0].dtype,
        "layers": [[g.kind, g.layers, g.num_kv_heads, g.k_width, g.v_width] for g in spec.groups],
        "rotary": [rotary(config.rope), rotary(config.local_rope), config.rotary_layers],
        "tokenizer": tokenizer,
    }
    return json.loads(json.dumps(found))


def check_identity(path: Path, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Does nothing if chunks saved for `saved` hold for `ours`.

    Raises:
      ForeignChunks: they do not; the first difference is named.
    """
    for name, wanted in ours.items():
        if (found := saved.get(name)) != wanted:
            raise ForeignChunks(
                f"{path} was saved for another {name.replace('_', ' ')}: {found!r}; here it is "
                f"{wanted!r}"
            )


def save(
    path: Path, about: Mapping[str, Any], variants: list[Variant], spec: KVSpec,
    export: Callable[[Variant], Spans],
) -> int:  # fmt: skip
    """Writes variants to a file; its bytes. `export` gives the KV of one.

    Raises:
      ValueError: a strategy keeps something that cannot be saved.
    """
    key = secrets.token_bytes(16)
    owners = {salt: salt_hash(salt, key) for salt in {v.key.salt for v in variants}}
    entries = [_entry(v, owners[v.key.salt], spec, export) for v in variants]
    return chunk_file.write(path, {**about, _SALT_KEY: key.hex()}, entries)


def salt_hash(salt: str | None, key: bytes) -> str | None:
    """What a file says of a salt: scrypt of it; some 10 ms. None for none."""
    if salt is None:
        return None
    return hashlib.scrypt(salt.encode(), salt=key, n=2**12, r=8, p=1, dklen=16).hex()


def _entry(
    variant: Variant, owner: str | None, spec: KVSpec, export: Callable[[Variant], Spans]
) -> Entry:
    kept = _Kept()
    fields = {
        "owner": owner,
        "context": variant.key.context,
        "base": variant.base,
        "lineage": variant.lineage,
        "context_chunks": list(variant.context_chunks),
        "on_host": not variant.page_ids,
        "pins": variant.pins,
        "uses": variant.uses,
        "scores": kept.encode(variant.scores),
        "facts": kept.encode(variant.facts),
        "arrays": kept.encode(variant.arrays),
    }
    tokens = {
        "tokens": variant.tokens,
        "tail": np.asarray(variant.tail, np.int64),
        "context_ids": np.asarray(variant.context_ids, np.int64),
    }
    shapes = {key: (array.dtype, array.shape) for key, array in (tokens | kept.arrays).items()}
    groups = spec.groups if variant.page_ids else ()
    for number in range(len(groups)):
        shapes |= _group_shapes(spec, number, variant.num_tokens)

    def read() -> dict[str, np.ndarray]:
        spans, found = export(variant) if groups else (), tokens | kept.arrays
        for number, group in enumerate(groups):
            for part in _SPAN_PARTS:
                if f"{part}{number}" in shapes:
                    layers = [np.asarray(getattr(spans[layer], part)) for layer in group.layers]
                    found[f"{part}{number}"] = np.stack(layers)
        return found

    return Entry(fields, shapes, read)


def _group_shapes(
    spec: KVSpec, number: int, num_tokens: int
) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """The arrays that hold the KV of a group: its layers first."""
    group = spec.groups[number]
    return {
        f"{part}{number}": (array.dtype, (len(group.layers), *array.shape))
        for part, array in empty_span(group, num_tokens)._asdict().items()
        if array is not None
    }


class SavedChunks:
    """A file of saved chunks, opened for one model, with some salts. Use it in a `with`.

    Raises, when it is opened:
      CorruptChunks: it is damaged, or no such file.
      ForeignChunks: its chunks hold for another model, KV type or tokenizer.
      FileNotFoundError: there is none.
    """

    def __init__(
        self, path: Path, about: Mapping[str, Any], spec: KVSpec, salts: Iterable[str] = ()
    ) -> None:
        self._file, self._spec = ChunkFile(path), spec
        try:
            check_identity(path, self._file.about, about)
            key = _salt_key(path, self._file.about)
            self._salts = {salt_hash(salt, key): salt for salt in (None, *salts)}
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._file.entries)

    def is_ours(self, number: int) -> bool:
        """Whether an entry has no salt, or one of those that were named."""
        return self._file.entries[number].get("owner", "") in self._salts

    def read(self, number: int) -> tuple[Variant, Spans | None] | None:
        """A variant without pages, of those that `is_ours`, and its KV, if it had pages; None, with
        a warning, if it is damaged."""
        fields, arrays = self._file.entries[number], self._file.read(number)
        if arrays is None:
            log.warning(
                "%s: saved chunk %d of %d (%d tokens) does not fit its checksum and is dropped",
                self._file.path, number + 1, len(self), self._file.shapes(number)["tokens"][1][0],
            )  # fmt: skip
            return None
        try:
            variant = _variant(fields, arrays, self._salts[fields["owner"]])
            on_host = fields["on_host"]
            return variant, None if on_host else self._spans(arrays, variant.num_tokens)
        except ForeignChunks:
            raise
        except (KeyError, TypeError, ValueError) as error:  # its checksums fit: another writer
            raise CorruptChunks(f"{self._file.path}: chunk {number + 1}: {error!r}") from error

    def _spans(self, arrays: Mapping[str, np.ndarray], num_tokens: int) -> Spans:
        spans: dict[int, KVSpan] = {}
        for number, group in enumerate(self._spec.groups):
            for key, (dtype, shape) in _group_shapes(self._spec, number, num_tokens).items():
                if (arrays[key].dtype, arrays[key].shape) != (dtype, shape):
                    raise ValueError(f"{key} is {arrays[key].dtype}{arrays[key].shape}")
            parts = [arrays.get(f"{part}{number}") for part in _SPAN_PARTS]
            for at, layer in enumerate(group.layers):
                spans[layer] = KVSpan(*(None if p is None else p[at] for p in parts))  # type: ignore[arg-type]
        return tuple(spans[layer] for layer in range(self._spec.num_layers))

    def close(self) -> None:
        """Closes the file."""
        self._file.__exit__()

    def __enter__(self) -> "SavedChunks":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _salt_key(path: Path, about: Mapping[str, Any]) -> bytes:
    try:
        return bytes.fromhex(about[_SALT_KEY])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptChunks(f"{path}: the header has no key of its salts ({error!r})") from error


def _variant(
    fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray], salt: str | None
) -> Variant:
    tokens, tail = arrays["tokens"], tuple(arrays["tail"].tolist())
    return Variant(
        key=VariantKey(salt, tokens_hash((*tokens.tolist(), *tail)), fields["context"]),
        tokens=tokens,
        base=fields["base"],
        page_ids=[],
        first=0,
        lineage=fields["lineage"],
        context_ids=tuple(arrays["context_ids"].tolist()),
        context_chunks=tuple(fields["context_chunks"]),
        tail=tail,
        scores=_decode(fields["scores"], arrays),
        facts=_decode(fields["facts"], arrays),
        arrays=_decode(fields["arrays"], arrays),
        pins=fields["pins"],
        uses=fields["uses"],
    )


# ---- what strategies keep -----------------------------------------------------------------------


class _Kept:
    """Values as JSON, with their arrays apart; an array that occurs twice is kept once."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self._names: dict[int, str] = {}

    def encode(self, value: Any) -> Any:
        """Raises `ValueError` for what no file could give back."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, np.ndarray):
            name = self._names.setdefault(id(value), f"kept{len(self._names)}")
            self.arrays[name] = value
            return {"array": name}
        if dataclasses.is_dataclass(value) or hasattr(value, "_fields"):
            return {"record": [*_name(type(value)), self.encode(_fields(value))]}
        if isinstance(value, tuple | list):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [self.encode(item) for item in value]}
        if isinstance(value, Mapping):
            pairs = [[self.encode(key), self.encode(item)] for key, item in value.items()]
            return {"mapping": pairs}
        raise ValueError(f"a chunk keeps a {type(value).__name__}, which cannot be saved")


def _is_of_reuse(module: str) -> bool:
    """Whether records may come from there: nothing else is ever looked up by a name in a file."""
    ours = module.startswith(f"{reuse.__name__}.")
    known = ours or any(module == kind.__module__ for kind in reuse.STRATEGIES.values())
    return known and module in sys.modules


def _name(kind: type) -> tuple[str, str]:
    """How `_record` finds a dataclass or named tuple again."""
    if not _is_of_reuse(kind.__module__) or kind.__qualname__ != kind.__name__:
        raise ValueError(f"a chunk keeps a {kind.__name__}, which cannot be saved")
    return kind.__module__, kind.__name__


def _fields(value: Any) -> dict[str, Any]:
    if hasattr(value, "_fields"):
        return value._asdict()
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def _record(module: str, name: str) -> Callable[..., Any]:
    found = getattr(sys.modules[module], name, None) if _is_of_reuse(module) else None
    if isinstance(found, type) and (dataclasses.is_dataclass(found) or hasattr(found, "_fields")):
        return found
    raise ForeignChunks(f"a chunk keeps a {module}.{name}, which no strategy here knows")


def _decode(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """What `_Kept.encode` was given."""
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    match kind:
        case "array":
            return arrays[inner]
        case "tuple":
            return tuple(_decode(item, arrays) for item in inner)
        case "list":
            return [_decode(item, arrays) for item in inner]
        case "mapping":
            return {_decode(key, arrays): _decode(item, arrays) for key, item in inner}
        case "record":
            module, name, fields = inner
            return _record(module, name)(**_decode(fields, arrays))
    raise ValueError(f"unknown kind {kind!r}")
