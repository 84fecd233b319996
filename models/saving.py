"""Writes any checkpoint as an Orbax checkpoint of our own: what `kvjax convert` does."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from kvjax.models import model_config
from kvjax.models.checkpoint import Checkpoint
from kvjax.models.checkpoint.orbax import MANIFEST, checksum, file_sizes
from kvjax.models.tokenizers import Tokenizer, load_tokenizer
from kvjax.models.tokenizers.huggingface import HuggingFaceTokenizer

SavedDtype = Literal["auto", "float32", "bfloat16"]
SAVED_DTYPES: tuple[SavedDtype, ...] = ("auto", "float32", "bfloat16")
Progress = Callable[[int, int], None]  # tensors written, tensors in all

_PART_BYTES = 256 << 20
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "generation_config.json",
                    "chat_template.*", "LICENSE*")  # fmt: skip


def save_checkpoint(
    checkpoint: Checkpoint,
    folder: str | Path,
    *,
    dtype: SavedDtype = "auto",
    progress: Progress | None = None,
    part_bytes: int = _PART_BYTES,
) -> Path:
    """Writes `checkpoint` to `folder`, which `LLM(folder)` then loads in any weight type.

    "auto" keeps every tensor's type (a GGUF file's are float32 once dequantised). The folder
    appears whole or not at all; tensors are read one by one, `part_bytes` of them are held.

    Raises:
      ValueError: `folder` exists and is not empty, or `dtype` is unknown.
      UnsupportedModel, TokenizerNotFound, CorruptWeights: the checkpoint could not be served.
    """
    if dtype not in SAVED_DTYPES:
        raise ValueError(f"dtype must be one of {SAVED_DTYPES}, got {dtype!r}")
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder")
    model_config(checkpoint.config)
    tokenizer = load_tokenizer(checkpoint)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        draft = Path(name) / "checkpoint"
        draft.mkdir()
        manifest = _write_arrays(checkpoint, draft, dtype, progress, part_bytes)
        _write_tokenizer(checkpoint, tokenizer, draft)
        text = json.dumps({"config": checkpoint.config, **manifest}, indent=1)
        (draft / MANIFEST).write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
    return folder


def _write_arrays(
    checkpoint: Checkpoint,
    draft: Path,
    dtype: SavedDtype,
    progress: Progress | None,
    part_bytes: int,
) -> dict[str, Any]:
    """Stores all tensors in parts; the manifest's entries about them."""
    import orbax.checkpoint as ocp  # slow to import, and few runs need it

    parts, empty, exact, done = {}, {}, True, 0
    with ocp.PyTreeCheckpointer() as checkpointer:
        for number, part in enumerate(_parts(checkpoint, part_bytes)):
            stored = {name: _cast(array, dtype) for name, array in part.items() if array.size}
            empty |= {n: [list(a.shape), str(a.dtype)] for n, a in part.items() if not a.size}
            exact &= all(np.can_cast(part[n].dtype, a.dtype, "safe") for n, a in stored.items())
            if stored:
                path = draft / f"arrays-{number:05}"
                checkpointer.save(path, stored)
                parts[path.name] = {
                    "tensors": {name: checksum(array) for name, array in stored.items()},
                    "files": file_sizes(path),
                }
            done += len(part)
            if progress is not None:
                progress(done, len(checkpoint.tensors))
    fingerprint = checkpoint.fingerprint
    if not exact:  # other values give other KV, which must not be taken for the original's
        fingerprint = hashlib.sha256(f"{fingerprint} as {dtype}".encode()).hexdigest()
    return {"fingerprint": fingerprint, "parts": parts, "empty": empty}


def _parts(checkpoint: Checkpoint, part_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    """Runs of tensors of about `part_bytes` as they are read, at least one tensor each."""
    part: dict[str, np.ndarray] = {}
    for name, array in checkpoint.tensors.items():
        if part and sum(a.nbytes for a in part.values()) + array.nbytes > part_bytes:
            yield part
            part = {}
        part[name] = array
    if part:
        yield part


def _cast(array: np.ndarray, dtype: SavedDtype) -> np.ndarray:
    is_float = array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16
    if dtype == "auto" or not is_float:
        return array
    return array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)


def _write_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer, draft: Path) -> None:
    """Copies the tokenizer's files, or writes them for a vocabulary that a GGUF file holds."""
    if checkpoint.format != "gguf":
        for pattern in _TOKENIZER_FILES:
            for file in checkpoint.folder.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, draft / file.name)
        return
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    description = json.loads(tokenizer.to_json())
    description["decoder"] = description.get("decoder") or _sentencepiece_decoder(tokenizer)
    bos, ends = tokenizer.bos_token_id, tokenizer.eos_token_ids
    settings = {
        "bos_token": None if bos is None else tokenizer.id_to_token(bos),
        "eos_token": tokenizer.id_to_token(ends[0]) if ends else None,
        "chat_template": tokenizer.chat_template,
    }
    for name, table in (
        ("tokenizer.json", description),
        ("tokenizer_config.json", settings),
        ("generation_config.json", {"eos_token_id": list(ends)}),
    ):
        (draft / name).write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")


def _sentencepiece_decoder(tokenizer: Tokenizer) -> dict[str, Any]:
    """How pieces become text again, which `tokenizer.json` must say."""
    space = {"type": "Replace", "pattern": {"String": "\N{LOWER ONE EIGHTH BLOCK}"}, "content": " "}
    steps = [space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if tokenizer.strips_leading_space:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
