"""What a benchmark run was measured with: commit, versions, machine, settings. No paths in it."""

import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SETTINGS = ("XLA_FLAGS", "JAX_PLATFORMS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_BLOCKTIME")
PACKAGES = (
    "kvjax", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "libtpu", "flax", "numpy",
    "tokenizers",
)  # fmt: skip


def base(command: str, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What every result says of its run, read at the start: nothing of it loads jax.

    Args:
        env: environment variables given to what is measured beside this process's own.
    """
    env = env or {}
    return {
        "command": command,
        "commit": commit(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(PACKAGES),
        "settings": {k: v for k in SETTINGS if (v := env.get(k, os.environ.get(k)))},
        "load_average_before": list(os.getloadavg()),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Python's, and the installed versions of those `packages` that are there."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def collect(
    *,
    threads: int,
    rounds: int,
    dtypes: Sequence[str],
    cases: Sequence[str],
    sizes: Mapping[str, int],
    prompt_ids: Sequence[int],
    model: Path | None,
    env: Mapping[str, str],
) -> dict[str, Any]:
    """The manifest at the start of a run; the load average is that before anything was started.

    Args:
        prompt_ids: the token stream that the prompts are cut from; only its hash is kept.
        env: environment variables given to every worker beside this process's own.
    """
    return {
        **base("engine", env),
        "threads": threads,
        "rounds": rounds,
        "dtypes": list(dtypes),
        "cases": list(cases),
        "sizes": dict(sizes),
        "seeds": "none: greedy decoding, fixed prompts",
        "prompts": {"tokens": len(prompt_ids), "sha256": hash_ids(prompt_ids)},
        "model": None if model is None else {"file": model.name, "sha256": hash_file(model)},
        "targets": {},  # name -> versions, options and idle CPU use, as each is loaded
    }


def commit() -> str:
    """The commit of the source tree, `-dirty` if tracked files differ; "unknown" outside git."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        state = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    if head.returncode != 0:
        return "unknown"
    return head.stdout.strip() + ("-dirty" if state.stdout.strip() else "")


def machine() -> dict[str, Any]:
    """CPU model, cores this process may use, memory, system; nothing that names the host."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def busy_seconds() -> float | None:
    """CPU time all processes of the machine have used so far; None where it is not known."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def hash_ids(ids: Sequence[int]) -> str:
    """SHA-256 of token ids written as decimal numbers with spaces between them."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
