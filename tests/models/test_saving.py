"""Checkpoints of our own: what is written loads back bit for bit, and damage is noticed."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from kvjax.cli import main
from kvjax.errors import CorruptWeights, TokenizerNotFound, UnsupportedModel
from kvjax.models import load_model, model_config
from kvjax.models.checkpoint import open_checkpoint
from kvjax.models.checkpoint.orbax import MANIFEST
from kvjax.models.saving import save_checkpoint
from kvjax.models.tokenizers import load_tokenizer
from tests.models.tiny_gguf import write_gguf
from tests.tiny_checkpoint import write_tiny_checkpoint

PROBES = ("Hello  world", " a<|end|>b", "déjà vu 🤖", "")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("source") / "model")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(ml_dtypes.bfloat16)
    tensors["model.position_ids"] = np.arange(5)
    tensors["model.nothing"] = np.zeros((0, 8), np.float32)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def saved(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    return save_checkpoint(open_checkpoint(source), folder, part_bytes=20_000)


def test_every_tensor_and_the_tokenizer_come_back_bit_for_bit(source, saved):
    before, after = open_checkpoint(source), open_checkpoint(saved)
    assert after.format == "orbax"
    assert after.config == before.config
    assert after.fingerprint == before.fingerprint, "the same weights, so the same KV"
    assert set(after.tensors) == set(before.tensors)
    assert len(list(saved.glob("arrays-*"))) > 1
    for name, expected in before.tensors.items():
        for read in (after.tensors[name], after.tensors[name]):  # any number of times
            assert read.dtype == expected.dtype
            np.testing.assert_array_equal(read, expected)
    old, new = load_tokenizer(before), load_tokenizer(after)
    assert old.fingerprint == new.fingerprint
    assert old.chat_template == new.chat_template


def test_a_narrower_type_is_stored_under_a_fingerprint_of_its_own(source, tmp_path):
    before = open_checkpoint(source)
    narrow = open_checkpoint(save_checkpoint(before, tmp_path / "bf16", dtype="bfloat16"))
    wide = open_checkpoint(save_checkpoint(before, tmp_path / "f32", dtype="float32"))
    name = "model.embed_tokens.weight"
    assert narrow.tensors[name].dtype == ml_dtypes.bfloat16
    assert narrow.tensors["model.position_ids"].dtype == np.int64
    np.testing.assert_array_equal(
        narrow.tensors[name], before.tensors[name].astype(ml_dtypes.bfloat16)
    )
    assert wide.tensors["model.norm.weight"].dtype == np.float32
    assert wide.fingerprint == before.fingerprint != narrow.fingerprint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_weight_type_loads_from_it(saved, dtype):
    opened = open_checkpoint(saved)
    config = model_config(opened.config)
    model = load_model(config, opened.tensors, dtype=dtype, num_positions=64)
    assert model.config.num_layers == 2


def test_the_vocabulary_inside_a_gguf_file_becomes_files(tmp_path):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["\u2581", "a", "b", "\u2581a", "ab", "\u2581ab", "h", "\u2581h"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces + words,
        "tokenizer.ggml.scores": [0.0] * len(pieces) + [-float(i) for i in range(len(words))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    before = open_checkpoint(write_gguf(tmp_path / "m.gguf", metadata=metadata))
    after = open_checkpoint(save_checkpoint(before, tmp_path / "out"))
    old, new = load_tokenizer(before), load_tokenizer(after)
    assert (
        (old.bos_token_id, old.eos_token_ids) == (new.bos_token_id, new.eos_token_ids) == (1, (2,))
    )
    assert old.strips_leading_space == new.strips_leading_space
    for text in ("ab a h", " ab", "déjà", "", "a  b"):
        ids = old.encode(text)
        assert new.encode(text) == ids
        assert new.decode(ids) == old.decode(ids)
        assert [new.token_bytes(i) for i in ids] == [old.token_bytes(i) for i in ids]


def _parts(folder: Path) -> list[Path]:
    return sorted(f for f in folder.glob("arrays-*/**/d/*") if f.stat().st_size > 2000)


def test_damage_is_corrupt_weights_and_never_other_numbers(saved, tmp_path):
    cut = Path(shutil.copytree(saved, tmp_path / "cut"))
    file = _parts(cut)[0]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptWeights, match=r"has \d+ bytes instead of"):
        open_checkpoint(cut)
    file.unlink()
    with pytest.raises(CorruptWeights, match="missing"):
        open_checkpoint(cut)
    flipped = Path(shutil.copytree(saved, tmp_path / "flipped"))
    for file in _parts(flipped):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    opened = open_checkpoint(flipped)
    with pytest.raises(CorruptWeights):
        dict(opened.tensors)
    swapped = Path(shutil.copytree(saved, tmp_path / "swapped"))
    manifest = json.loads((swapped / MANIFEST).read_text())
    part = next(iter(manifest["parts"].values()))
    part["tensors"] = dict.fromkeys(part["tensors"], 12345)
    (swapped / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CorruptWeights, match="another checksum"):
        open_checkpoint(swapped).tensors[next(iter(part["tensors"]))]


def test_what_could_not_be_served_is_refused_and_nothing_is_left(source, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        save_checkpoint(open_checkpoint(source), full)
    bare = Path(shutil.copytree(source, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    with pytest.raises(TokenizerNotFound):
        save_checkpoint(open_checkpoint(bare), tmp_path / "out")
    unknown = Path(shutil.copytree(source, tmp_path / "unknown"))
    config = json.loads((unknown / "config.json").read_text()) | {"model_type": "other"}
    (unknown / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel):
        save_checkpoint(open_checkpoint(unknown), tmp_path / "out")
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {"full", "bare", "unknown"}


def test_the_command_prints_the_folder(source, tmp_path, capsys):
    assert main(["convert", str(source), str(tmp_path / "out"), "--dtype", "bfloat16", "-q"]) == 0
    assert Path(capsys.readouterr().out.strip()) == tmp_path / "out"
    assert open_checkpoint(tmp_path / "out").format == "orbax"
