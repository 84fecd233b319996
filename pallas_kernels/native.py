"""C++ for what neither XLA nor Pallas does well on a CPU: compiled at first use, called by XLA.

A source file is compiled for the processor at hand with the machine's own C++ compiler, against the
FFI headers that come with jaxlib, and kept in `folder`. Where there is no compiler the backend
refuses, with the reason, and the XLA one takes its place.
"""

import ctypes
import functools
import hashlib
import platform
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax

_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-w",
          "-fPIC", "-shared")  # fmt: skip
_SECONDS = 120  # for one compilation

folder = Path.home() / ".cache" / "kvjax" / "native"  # of compiled files; an engine names its own


@functools.cache
def register(source: Path, symbol: str) -> None:
    """Makes the FFI handler `symbol` of a C++ file known to XLA:CPU, under its own name.

    Raises:
      NotImplementedError: it cannot be compiled here; the message says why.
    """
    handler = getattr(_library(source), symbol)
    jax.ffi.register_ffi_target(symbol, jax.ffi.pycapsule(handler), platform="cpu")


@functools.cache
def _library(source: Path) -> ctypes.CDLL:
    """The compiled file. Two processes may compile it at once: the last one's file stays."""
    compiler = next((path for name in _COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise NotImplementedError(f"cpu: no C++ compiler on PATH ({', '.join(_COMPILERS)})")
    target = folder / f"{source.stem}-{_key(source, compiler)}.so"
    if not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                built = Path(scratch) / target.name
                include = ("-I", jax.ffi.include_dir())
                subprocess.run(
                    [compiler, *_FLAGS, *include, str(source), "-o", str(built)],
                    check=True, capture_output=True, text=True, timeout=_SECONDS,
                )  # fmt: skip
                built.replace(target)
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if "error" in line]
            why = (lines or error.stderr.splitlines() or ["no message"])[0]
            raise NotImplementedError(f"cpu: {compiler} failed on {source.name}: {why}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotImplementedError(f"cpu: cannot compile {source.name}: {error}") from error
    return ctypes.cdll.LoadLibrary(str(target))


def _key(source: Path, compiler: str) -> str:
    """Names what the machine code depends on: source, compiler, headers and processor."""
    told = subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout
    digest = hashlib.sha256(source.read_bytes() + told)
    for part in (*_FLAGS, version("jaxlib"), platform.machine(), _processor()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
