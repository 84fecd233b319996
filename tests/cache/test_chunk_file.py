"""A file of entries gives back what was written, or says that it cannot."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from kvjax.cache.chunk_file import ChunkFile, Entry, write
from kvjax.errors import CorruptChunks

ARRAYS = [
    {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(3, dtype=np.uint16)},
    {"a": np.full((1, 2), 7, np.int8), "none": np.zeros((0, 4), np.float32)},
    {"number": np.asarray(2.5)},
]


def entry(fields, arrays) -> Entry:
    shapes = {key: (array.dtype, array.shape) for key, array in arrays.items()}
    return Entry(fields, shapes, lambda: arrays)


def written(folder: Path) -> Path:
    path = folder / "chunks.safetensors"
    write(path, {"model": "m"}, [entry({"n": n}, arrays) for n, arrays in enumerate(ARRAYS)])
    return path


def equal(found, wanted) -> bool:
    return found is not None and all(
        (found[k].dtype, found[k].shape) == (a.dtype, a.shape) and found[k].tobytes() == a.tobytes()
        for k, a in wanted.items()
    )


def test_what_was_written_is_read(tmp_path):
    with ChunkFile(written(tmp_path)) as file:
        assert file.about == {"model": "m"}
        assert file.entries == [{"n": 0}, {"n": 1}, {"n": 2}]
        assert all(equal(file.read(n), arrays) for n, arrays in enumerate(ARRAYS))
        assert file.shapes(0) == {"a": (np.float32, (2, 3)), "b": (np.uint16, (3,))}


def test_any_reader_of_safetensors_opens_it(tmp_path):
    tensors = safetensors.numpy.load_file(written(tmp_path))
    np.testing.assert_array_equal(tensors["0.a"], ARRAYS[0]["a"])
    assert tensors["checksums"].shape == (1 + len(ARRAYS), 16)


def test_a_damaged_byte_anywhere_refuses_the_file_or_drops_the_entry_it_is_in(tmp_path):
    path = written(tmp_path)
    whole = path.read_bytes()
    refused = 0
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        try:
            with ChunkFile(path) as file:
                found = [file.read(n) for n in range(len(file.entries))]
        except CorruptChunks:
            refused += 1
            continue
        assert sum(one is None for one in found) == 1
        pairs = zip(found, ARRAYS, strict=True)
        assert all(one is None or equal(one, wanted) for one, wanted in pairs)
    damaged = len(whole) - refused
    content = sum(a.nbytes for arrays in ARRAYS for a in arrays.values())
    assert damaged == content + 16 * len(ARRAYS)


def test_a_file_that_was_cut_off_or_grew_is_refused(tmp_path):
    path = written(tmp_path)
    whole = path.read_bytes()
    for data in (*(whole[:n] for n in range(len(whole))), whole + b"\0", whole + whole):
        path.write_bytes(data)
        with pytest.raises(CorruptChunks, match=r"chunks\.safetensors"):
            ChunkFile(path)


@given(st.binary(max_size=200))
def test_no_bytes_at_all_crash_the_reader(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "anything"
    for content in (data, len(data).to_bytes(8, "little") + data):
        path.write_bytes(content)
        with pytest.raises(CorruptChunks):
            ChunkFile(path)


def test_another_version_is_named(tmp_path):
    head = {"__metadata__": {"kvjax": json.dumps(
        {"format": "kvjax chunks", "version": 1, "about": {}, "entries": []})}}  # fmt: skip
    data = json.dumps(head).encode()
    (tmp_path / "new").write_bytes(len(data).to_bytes(8, "little") + data)
    with pytest.raises(CorruptChunks, match="version 1; wanted 'kvjax chunks' version 2"):
        ChunkFile(tmp_path / "new")


def test_a_save_that_fails_leaves_the_older_file_and_nothing_else(tmp_path):
    path = written(tmp_path)
    before = path.read_bytes()

    def fails():
        raise RuntimeError("the device is gone")

    broken = Entry({}, {"a": (np.dtype(np.float32), (1,))}, fails)
    with pytest.raises(RuntimeError):
        write(path, {}, [entry({}, ARRAYS[0]), broken])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_array_of_no_type_of_safetensors_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"0\.a is of type complex64"):
        write(tmp_path / "file", {}, [entry({}, {"a": np.zeros(1, np.complex64)})])
    assert not list(tmp_path.iterdir())
