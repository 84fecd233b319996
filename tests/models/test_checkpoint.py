"""Hugging Face folders, hub ids, and what `open_checkpoint` says when it cannot open."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from kvjax.errors import CorruptWeights, ModelNotFound, UnsupportedModel
from kvjax.models import checkpoint
from kvjax.models.checkpoint import FORMATS, open_checkpoint
from kvjax.models.checkpoint.orbax import MANIFEST

CONFIG = {"model_type": "llama", "hidden_size": 8}


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    dtypes = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]
    tensors = {
        f"model.layers.{i}.self_attn.q_proj.weight": rng.normal(size=(6, 8)).astype(dtype)
        for i, dtype in enumerate(dtypes)
    }
    tensors["model.position_ids"] = np.arange(5)
    tensors["model.scalar"] = np.array(3, np.float32)
    tensors["model.nothing"] = np.zeros((0, 8), np.float32)
    return tensors


def write_folder(path: Path, tensors: dict[str, np.ndarray], num_shards: int = 1) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    if num_shards == 1:
        safetensors.numpy.save_file(tensors, path / "model.safetensors")
        return path
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[shard::num_shards]}
        safetensors.numpy.save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_tensor_reads_back_bit_for_bit(tmp_path, num_shards):
    tensors = some_tensors()
    opened = open_checkpoint(write_folder(tmp_path / "m", tensors, num_shards))
    assert opened.format == "safetensors"
    assert opened.config == CONFIG
    assert opened.folder == tmp_path / "m"
    assert set(opened.tensors) == set(tensors)
    assert len(opened.tensors) == len(tensors)
    for name, expected in tensors.items():
        read = opened.tensors[name]
        assert read.dtype == expected.dtype
        assert read.shape == expected.shape
        assert read.tobytes() == expected.tobytes()


def test_what_is_read_belongs_to_the_reader(tmp_path):
    folder = write_folder(tmp_path / "m", {"a": np.ones((2, 2), np.float32)})
    opened = open_checkpoint(folder)
    first = opened.tensors["a"]
    first[:] = 7
    assert (opened.tensors["a"] == 1).all()
    shutil.rmtree(folder)
    assert (first == 7).all()


def test_a_truncated_file_is_told_at_open_wherever_it_was_cut(tmp_path):
    folder = write_folder(tmp_path / "m", some_tensors())
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(CorruptWeights, match=r"model\.safetensors"):
            open_checkpoint(folder)


def test_a_file_that_shrinks_after_open_is_told_when_read(tmp_path):
    folder = write_folder(tmp_path / "m", {"a": np.ones(64, np.float32)})
    opened = open_checkpoint(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CorruptWeights, match="wanted 256 bytes"):
        opened.tensors["a"]


@pytest.mark.parametrize(
    "header",
    [
        b"no json",
        b"[1, 2]",
        b'{"a": {"dtype": "F32", "shape": [2]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": 3}',
    ],
)
def test_a_malformed_header_is_corrupt(tmp_path, header):
    folder = write_folder(tmp_path / "m", {"a": np.ones(1, np.float32)})
    data = len(header).to_bytes(8, "little") + header + bytes(64)
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CorruptWeights):
        open_checkpoint(folder)


def test_a_missing_shard_and_a_shard_without_its_tensor_are_named(tmp_path):
    folder = write_folder(tmp_path / "m", some_tensors(), num_shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    safetensors.numpy.save_file({"other": np.ones(1, np.float32)}, shard)
    with pytest.raises(CorruptWeights, match="is in the index but not in here"):
        open_checkpoint(folder)
    shard.unlink()
    with pytest.raises(CorruptWeights, match=shard.name):
        open_checkpoint(folder)


def test_an_index_cannot_point_outside_its_folder(tmp_path):
    folder = write_folder(tmp_path / "m", some_tensors(), num_shards=2)
    safetensors.numpy.save_file({"a": np.ones(1, np.float32)}, tmp_path / "x.safetensors")
    index = {"weight_map": {"a": "../x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptWeights, match="plain file name"):
        open_checkpoint(folder)


def test_an_index_without_file_names_is_corrupt(tmp_path):
    folder = write_folder(tmp_path / "m", some_tensors(), num_shards=2)
    for index in ("[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "x", "b": null}}'):
        (folder / "model.safetensors.index.json").write_text(index)
        with pytest.raises(CorruptWeights, match=r"index\.json"):
            open_checkpoint(folder)


def test_a_missing_tensor_is_named_and_can_be_asked_about(tmp_path):
    opened = open_checkpoint(write_folder(tmp_path / "m", {"a": np.ones(1, np.float32)}))
    with pytest.raises(CorruptWeights, match=r"'lm_head\.weight' is missing"):
        opened.tensors["lm_head.weight"]
    assert "lm_head.weight" not in opened.tensors
    assert opened.tensors.get("lm_head.weight") is None
    assert opened.tensors.get("a") is not None


def test_fingerprints_of_copies_agree_and_of_anything_else_differ(tmp_path):
    tensors = some_tensors()
    folder = write_folder(tmp_path / "m", tensors)
    original = open_checkpoint(folder).fingerprint
    assert open_checkpoint(shutil.copytree(folder, tmp_path / "copy")).fingerprint == original
    seen = {original}
    name = "model.layers.1.self_attn.q_proj.weight"
    finetuned = tensors | {name: tensors[name] * np.float16(1.01)}
    seen.add(open_checkpoint(write_folder(tmp_path / "b", finetuned)).fingerprint)
    renamed = {f"x.{name}": tensor for name, tensor in tensors.items()}
    seen.add(open_checkpoint(write_folder(tmp_path / "c", renamed)).fingerprint)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"rope_theta": 5e5}))
    seen.add(open_checkpoint(folder).fingerprint)
    assert len(seen) == 4


def test_quantised_weights_are_refused_by_method(tmp_path):
    folder = write_folder(tmp_path / "m", some_tensors())
    config = CONFIG | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="gptq"):
        open_checkpoint(folder)


def test_a_folder_without_weights_says_what_it_found(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelNotFound, match=r"pytorch_model\.bin; pickled weights"):
        open_checkpoint(tmp_path)


def test_an_unknown_name_says_what_was_tried(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match=r"smollm2-135m.*path no-such-model"):
        open_checkpoint("no-such-model")


def test_an_unreachable_hub_is_one_of_the_things_tried(monkeypatch, tmp_path):
    def refuse(name, **options):
        raise ConnectionError(f"no route to {name}\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelNotFound, match=r"hub id org/name \(no route to org/name\)$"):
        open_checkpoint("org/name")


def test_a_hub_id_opens_what_the_hub_stored(monkeypatch, tmp_path):
    folder = write_folder(tmp_path / "m", some_tensors())
    asked = []

    def snapshot(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert open_checkpoint("org/name").path == folder
    ((name, patterns),) = asked
    assert name == "org/name"
    assert {"*.safetensors", "*.json"} <= set(patterns)


def test_a_folder_of_ours_is_detected_before_any_other_format(tmp_path):
    folder = write_folder(tmp_path / "m", some_tensors())
    manifest = {"config": CONFIG, "fingerprint": "f00"}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    opened = open_checkpoint(folder)
    assert (opened.format, opened.config, opened.fingerprint) == ("orbax", CONFIG, "f00")
    (folder / MANIFEST).write_text("{}")
    with pytest.raises(CorruptWeights):
        open_checkpoint(folder)


def test_a_format_from_outside_registers_through_the_table(monkeypatch, tmp_path):
    class Theirs:
        def detects(self, path: Path) -> bool:
            return path.suffix == ".theirs"

        def open(self, path: Path) -> checkpoint.Checkpoint:
            return open_checkpoint(path.with_suffix(""))

    monkeypatch.setitem(FORMATS, "theirs", Theirs())
    folder = write_folder(tmp_path / "m", some_tensors())
    (tmp_path / "m.theirs").touch()
    assert open_checkpoint(tmp_path / "m.theirs").path == folder
