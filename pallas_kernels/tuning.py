"""Block sizes of the kernels: a rule per kernel, and what was measured to be better.

`<operation>/tuned/<device kind>.json` maps a kernel's name to a list of `[facts, sizes]`: where all
`facts` hold for a call, `sizes` replace those of the rule. `kvjax bench kernels --tune` writes
these files; none is needed.
"""

import contextlib
import functools
import json
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

Sizes = dict[str, int]
RULES: dict[str, Callable[..., Sizes]] = {}  # "operation/kernel" -> sizes from the facts of a call
_override: dict[str, Sizes] = {}  # what `--tune` is trying just now
_asked: dict[str, list[dict[str, int]]] = {}  # facts of the calls that `--tune` is looking at


def rule(kernel: str) -> Callable[[Callable[..., Sizes]], Callable[..., Sizes]]:
    """Registers the decorated function as the rule of `kernel`."""

    def register(fn: Callable[..., Sizes]) -> Callable[..., Sizes]:
        RULES[kernel] = fn
        return fn

    return register


def block_sizes(kernel: str, **facts: int) -> Sizes:
    """Sizes for one call of `kernel` ("operation/kernel"): tried, measured or from the rule."""
    if facts not in (seen := _asked.get(kernel, [facts])):
        seen.append(facts)
    sizes = RULES[kernel](**facts)
    operation, name = kernel.split("/")
    for known, better in _table(operation, _device_kind()).get(name, []):
        if all(facts.get(fact) == value for fact, value in known.items()):
            sizes |= better
    return sizes | _override.get(kernel, {})


def try_sizes(kernel: str, sizes: Mapping[str, int] | None) -> None:
    """Makes every later trace use `sizes` for `kernel`; None goes back to the table."""
    _override.pop(kernel, None)
    if sizes is not None:
        _override[kernel] = dict(sizes)


@contextlib.contextmanager
def asking(kernel: str) -> Iterator[list[dict[str, int]]]:
    """Gives a list that gathers the facts for which sizes of `kernel` are asked, each once."""
    _asked[kernel] = []
    try:
        yield _asked[kernel]
    finally:
        del _asked[kernel]


def record(kernel: str, facts: Mapping[str, int], sizes: Mapping[str, int]) -> Path:
    """Writes `sizes` as the best for `facts` on this device kind; returns the table's path."""
    operation, name = kernel.split("/")
    path = _path(operation, _device_kind())
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    entries = [entry for entry in table.get(name, []) if entry[0] != dict(facts)]
    table[name] = [*entries, [dict(facts), dict(sizes)]]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
    _table.cache_clear()
    return path


def _device_kind() -> str:
    """The kind of device that a trace made now is for: a deviceless topology's, else our own.

    A CPU's is its model: jax calls all of them "cpu".
    """
    target = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    kind = target.device_kind if target is not None else jax.devices()[0].device_kind
    return f"cpu {_processor()}" if kind == "cpu" else kind


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


@functools.cache
def _table(operation: str, kind: str) -> dict[str, Any]:
    path = _path(operation, kind)
    return json.loads(path.read_text()) if path.exists() else {}


def _path(operation: str, kind: str) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    return Path(__file__).parent / operation / "tuned" / f"{name}.json"
