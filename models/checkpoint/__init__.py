"""Weights on disk under one description: `open_checkpoint` finds them, a format reads them.

Adding a format: a module (or object) with `detects` and `open`, and one row in `FORMATS`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kvjax.errors import ModelNotFound
from kvjax.models import pull
from kvjax.models.checkpoint import gguf, orbax, safetensors

_HUB_FILES = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Checkpoint(Protocol):
    """A model on disk: opened and checked for completeness, its tensors not yet read."""

    @property
    def format(self) -> str:
        """Key in `FORMATS`."""
        ...

    @property
    def path(self) -> Path:
        """The folder or file that was opened."""
        ...

    @property
    def folder(self) -> Path:
        """Where tokenizer files lie, if the format does not hold its own."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """Hugging Face's `config.json`, or its equivalent made from the file's own metadata."""
        ...

    @property
    def tensors(self) -> Mapping[str, np.ndarray]:
        """Hugging Face names -> arrays (linear weights `[out, in]`), each read when asked for.

        Every access reads the file and returns a fresh array that the caller owns. A name that is
        missing raises `CorruptWeights`, and so does a file that shrank since it was opened.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest that tells these weights from others without reading all of them.

        Covers the config, the names, types and shapes, and a sample of every tensor's bytes. It
        does not depend on the path or on file times, so replicas with copies agree.
        """
        ...


class Format(Protocol):
    """One way to store a checkpoint."""

    def detects(self, path: Path) -> bool:
        """Whether `path` (which exists) is stored this way; looks at names only."""
        ...

    def open(self, path: Path) -> Checkpoint:
        """Reads headers and checks sizes. Raises `CorruptWeights` or `UnsupportedModel`."""
        ...


# In order of preference: a folder that holds two formats is opened as the first.
FORMATS: dict[str, Format] = {"orbax": orbax, "safetensors": safetensors, "gguf": gguf}


def open_checkpoint(name_or_path: str | Path) -> Checkpoint:
    """Opens a named model, a folder, a `.gguf` file or a hub id `org/name`, in this order.

    Named models (`kvjax.models.pull.NAMED_MODELS`) and hub ids are fetched when they are not in
    the cache yet. `ModelNotFound` says what was tried; `CorruptWeights` means a file is truncated
    or a shard is missing; `UnsupportedModel` names what cannot be read.
    """
    name = str(name_or_path)
    if name in pull.NAMED_MODELS:
        return _open_path(pull.pull(name))
    path = Path(name_or_path).expanduser()
    if path.exists():
        return _open_path(path)
    tried = [f"named models ({', '.join(pull.NAMED_MODELS)})", f"path {path}"]
    if not _HUB_ID.fullmatch(name):
        raise ModelNotFound(f"no model {name!r}; tried {', '.join(tried)}")
    return _open_path(_snapshot(name, tried))


def _open_path(path: Path) -> Checkpoint:
    for candidate in FORMATS.values():
        if candidate.detects(path):
            return candidate.open(path)
    found = sorted(entry.name for entry in path.iterdir())[:20] if path.is_dir() else [path.name]
    hint = ""
    if any(name.endswith((".bin", ".pt", ".pth")) for name in found):
        hint = "; pickled weights are not read, convert them to safetensors"
    raise ModelNotFound(
        f"{path} holds no checkpoint: wanted config.json with *.safetensors, or a .gguf file; "
        f"found {', '.join(found) or 'nothing'}{hint}"
    )


def _snapshot(name: str, tried: list[str]) -> Path:
    """Folder with the files of hub id `name`, fetched unless the hub's own cache has them."""
    import huggingface_hub  # loads an HTTP stack, which local models do not need

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (OSError, ValueError, RuntimeError) as error:  # refused, offline, no such id, disk full
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        tried.append(f"hub id {name} ({reason})")
        raise ModelNotFound(f"no model {name!r}; tried {', '.join(tried)}") from error
