"""A folder written by kvjax itself: `kvjax_checkpoint.json` beside the arrays that Orbax stored."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from kvjax.errors import CorruptWeights
from kvjax.models.checkpoint.tensors import TensorMap

MANIFEST = "kvjax_checkpoint.json"


@dataclasses.dataclass(frozen=True)
class OrbaxCheckpoint:
    """See `kvjax.models.checkpoint.Checkpoint`.

    The arrays already have the model's own structure, not Hugging Face's names, and are restored
    straight onto their devices: so `tensors` is empty, and the model restores them from `folder`.
    """

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
    """Opens the folder by its manifest; the arrays are not looked at.

    The manifest's "fingerprint", that of the weights it was made from, is kept if it is there, so
    that a converted model shares its stored KV with the original.
    """
    text = (path / MANIFEST).read_text(encoding="utf-8")
    try:
        manifest = json.loads(text)
        config = dict(manifest["config"])
        fingerprint = manifest.get("fingerprint") or hashlib.sha256(text.encode()).hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptWeights(f"{path / MANIFEST}: malformed ({error!r})") from error
    return OrbaxCheckpoint(path, config, TensorMap({}, path), fingerprint)
