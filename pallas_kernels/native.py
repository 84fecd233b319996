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

COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-w",
          "-fPIC", "-shared")  # fmt: skip
_SECONDS = 120  # for one compilation
_HEADERS = Path(__file__).parent  # what the sources include lies here or beside them

folder = Path.home() / ".cache" / "kvjax" / "native"  # of compiled files; an engine names its own


@functools.cache
def register(source: Path, symbol: str) -> None:
    """Makes the FFI handler `symbol` of a C++ file known to XLA:CPU, under its own name.

    Raises:
      NotImplementedError: it cannot be compiled here; the message says why.
    """
    library = _outcome(source)
    if isinstance(library, NotImplementedError):
        raise NotImplementedError(str(library)) from library
    handler = getattr(library, symbol)
    jax.ffi.register_ffi_target(symbol, jax.ffi.pycapsule(handler), platform="cpu")


@functools.cache
def _outcome(source: Path) -> ctypes.CDLL | NotImplementedError:
    """The compiled file or why there is none: a compiler that fails is asked once."""
    try:
        return _library(source)
    except NotImplementedError as why:
        return why


def _library(source: Path) -> ctypes.CDLL:
    """The compiled file. Two processes may compile it at once: the last one's file stays."""
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise NotImplementedError(f"cpu: no C++ compiler on PATH ({', '.join(COMPILERS)})")
    try:
        target = folder / f"{source.stem}-{_key(source, compiler)}.so"
        if not target.exists():
            _compile(source, compiler, target)
    except subprocess.CalledProcessError as error:
        told = (error.stderr or "").splitlines()
        why = next((line for line in told if "error" in line), (told or ["no message"])[0])
        raise NotImplementedError(f"cpu: {compiler} failed on {source.name}: {why}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotImplementedError(f"cpu: cannot compile {source.name}: {error}") from error
    try:
        return ctypes.cdll.LoadLibrary(str(target))
    except OSError as error:
        raise NotImplementedError(f"cpu: cannot load {source.name}: {error}") from error


def _compile(source: Path, compiler: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / target.name
        include = ("-I", jax.ffi.include_dir(), "-I", str(_HEADERS))
        subprocess.run(
            [compiler, *_FLAGS, *include, str(source), "-o", str(built)],
            check=True, capture_output=True, text=True, timeout=_SECONDS,
        )  # fmt: skip
        built.replace(target)


def _key(source: Path, compiler: str) -> str:
    """Names what the machine code depends on: source, compiler, headers and processor."""
    told = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, timeout=_SECONDS
    ).stdout
    headers = sorted([*_HEADERS.glob("*.h"), *source.parent.glob("*.h")])
    digest = hashlib.sha256(b"\0".join([told, *(path.read_bytes() for path in (source, *headers))]))
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
