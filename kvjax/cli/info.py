"""`kvjax info`: one page about this installation, for questions and bug reports."""

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from kvjax import __version__
from kvjax.cli.options import show_size
from kvjax.config import cache_dir, host_memory
from kvjax.models.pull import cached_models
from kvjax.pallas_kernels import cascade_refusal, native
from kvjax.pallas_kernels.dispatch import OPERATIONS

HELP = "versions, devices, kernels, caches"
EPILOG = """\
The kernel table says, for each operation, which backend the device at hand gets, and why not the
others. Set JAX_PLATFORMS=cpu to see it for the CPU on a machine with an accelerator.
"""

_PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "tokenizers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no flags."""


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    console = Console()
    native.folder = cache_dir() / "native"
    for table in (_versions(), _devices(), _kernels(), _caches()):
        console.print(table)
    return 0


def _versions() -> Table:
    table = _table("versions", "package", "version")
    table.add_row("kvjax", __version__)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        table.add_row(package, importlib.metadata.version(package))
    return table


def _devices() -> Table:
    table = _table(f"devices (platform {jax.default_backend()})", "device", "kind", "memory")
    for device in jax.devices():
        stats = device.memory_stats() or {}
        used, limit = stats.get("bytes_in_use"), stats.get("bytes_limit")
        memory = "the host's" if limit is None else f"{show_size(used or 0)} of {show_size(limit)}"
        table.add_row(str(device), device.device_kind, memory)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    table.add_row("host", f"{platform.machine()}, {cores} cores", show_size(host_memory()))
    return table


def _kernels() -> Table:
    table = _table("kernels", "operation", "backend", "")
    for name, operation in sorted(OPERATIONS.items()):
        told = operation.explain(jax.default_backend())
        for backend, why in sorted(told.items(), key=lambda item: item[1] != "chosen"):
            table.add_row(name, backend, why)
            name = ""
    never = cascade_refusal(jax.default_backend())
    told = "each decode step by its bytes (plan_cascade)" if never is None else f"never: {never}"
    table.add_row("cascade_attention", "the engine", told)
    return table


def _caches() -> Table:
    table = _table("caches", "what", "size")
    table.add_column("where", overflow="fold")
    for model in cached_models():
        table.add_row(f"model {model.name}", show_size(model.num_bytes), str(model.path))
    programs = Path(jax.config.values["jax_compilation_cache_dir"] or cache_dir() / "xla")
    for what, folder in (("programs", programs), ("kernels", cache_dir() / "native")):
        sizes = [f.stat().st_size for f in folder.rglob("*") if f.is_file()]
        table.add_row(f"{len(sizes)} compiled {what}", show_size(sum(sizes)), str(folder))
    return table


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left")
