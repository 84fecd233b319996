"""C++ is compiled once for each processor, and where it cannot be, the backend says why."""

import shutil
from pathlib import Path

import pytest

from kvjax.pallas_kernels import OPERATIONS, native
from tests.pallas_kernels.attention_cases import Heads, attend, causal, problem

SOURCE = """
#include "xla/ffi/api/ffi.h"
static xla::ffi::Error Nothing() { return xla::ffi::Error::Success(); }
XLA_FFI_DEFINE_HANDLER_SYMBOL(kvjax_test_nothing, Nothing, xla::ffi::Ffi::Bind());
"""


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(native, "folder", tmp_path / "cache" / "native")
    path = tmp_path / "nothing.cc"
    path.write_text(SOURCE)
    return path


def test_a_file_is_compiled_once_and_again_when_it_changes(source, tmp_path):
    folder = tmp_path / "cache" / "native"
    native.register(source, "kvjax_test_nothing")
    (built,) = folder.iterdir()
    first = built.stat().st_mtime_ns
    native._library(source)
    assert [(f, f.stat().st_mtime_ns) for f in folder.iterdir()] == [(built, first)]
    source.write_text(SOURCE + "// changed")
    native._library(source)
    assert len(list(folder.iterdir())) == 2


SOURCES = sorted(Path(native.__file__).parent.glob("*/*.cc"))


@pytest.mark.skipif(not any(map(shutil.which, native.COMPILERS)), reason="no C++ compiler on PATH")
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.parent.name)
def test_every_source_compiles_where_there_is_a_compiler(path):
    native._library(path)


def test_a_compiler_that_does_not_work_is_refused_with_the_reason(source, monkeypatch, tmp_path):
    broken = tmp_path / "bin" / "c++"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken.parent}:/usr/bin:/bin")
    with pytest.raises(NotImplementedError, match=r"failed on nothing\.cc"):
        native.register(source, "kvjax_test_nothing")


def test_a_library_that_cannot_be_loaded_is_refused_with_the_reason(source, monkeypatch):
    def refuse(path: str) -> None:
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(native.ctypes.cdll, "LoadLibrary", refuse)
    with pytest.raises(NotImplementedError, match=r"cannot load nothing\.cc: .*failed to map"):
        native.register(source, "kvjax_test_nothing")


def test_without_a_compiler_the_reason_is_given(source, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotImplementedError, match=r"no C\+\+ compiler on PATH"):
        native.register(source, "kvjax_test_nothing")


def test_a_compiler_that_fails_is_asked_once(source, monkeypatch):
    source.write_text("nonsense")
    calls = []
    compile_ = native._compile
    monkeypatch.setattr(native, "_compile", lambda *args: calls.append(args) or compile_(*args))
    for _ in range(3):
        with pytest.raises(NotImplementedError, match="nonsense"):
            native.register(source, "kvjax_test_nothing")
    assert len(calls) == 1


def test_what_the_compiler_says_is_told(source):
    source.write_text(SOURCE.replace("Success", "Succes"))
    with pytest.raises(NotImplementedError, match=r"failed on nothing\.cc: .*Succes"):
        native.register(source, "kvjax_test_nothing")


def test_without_a_compiler_attention_falls_back_to_xla(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(native, "register", native.register.__wrapped__)
    monkeypatch.setattr(native, "_outcome", native._outcome.__wrapped__)
    told = OPERATIONS["paged_attention"].explain("cpu")
    assert told["cpu"].startswith("cpu: no C++ compiler")
    assert told["xla"] == "chosen"
    p = problem(1, Heads(4, 2, 32), [(20, causal(20, 3))])
    chosen = OPERATIONS["paged_attention"](
        p.q, p.pages, p.block_tables, p.query_starts, p.kv_lens, p.lo, p.hi, scale=32**-0.5
    )
    assert (chosen == attend(p, backend="xla")[0]).all()
