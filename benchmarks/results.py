"""Results of a benchmark run: kept after every measurement, read back, and shown as tables."""

import dataclasses
import json
import os
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

VERSION = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Metric:
    """What a number is: `heading` is its column, `higher` whether more is better."""

    heading: str
    unit: str
    higher: bool
    digits: int


METRICS: dict[str, Metric] = {
    "prefill_tps": Metric("prefill", "tokens/s", True, 0),
    "decode_b1_tps": Metric("decode, batch 1", "tokens/s", True, 1),
    "decode_b8_tps": Metric("decode, batch 8", "tokens/s", True, 1),
    "total_b8_s": Metric("batch 8, total", "s", False, 2),
    "ttft_cold_s": Metric("first token, cold", "s", False, 3),
    "ttft_warm_s": Metric("first token, warm prefix", "s", False, 3),
    "shared_prefix_s": Metric("8 on a shared prefix", "s", False, 2),
    "start_up_empty_cache_s": Metric("start-up, empty cache", "s", False, 2),
    "start_up_s": Metric("start-up", "s", False, 2),
    "load_s": Metric("load and warm-up", "s", False, 2),
    "peak_rss_mib": Metric("peak memory", "MiB", False, 0),
    "other_cores": Metric("CPUs used by others", "cores", False, 2),
    "same_tokens": Metric("tokens as the first target's", "tokens", True, 0),
}


class Results:
    """Rows of raw values per target, dtype and metric, and the errors met. `save` is atomic."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = dict(manifest)
        self.status = "running"
        self.values: dict[tuple[str, str, str], list[float]] = {}
        self.errors: list[dict[str, Any]] = []

    def add(self, target: str, dtype: str, metric: str, value: float) -> None:
        """Appends one raw value."""
        assert metric in METRICS, metric
        self.values.setdefault((target, dtype, metric), []).append(value)

    def fail(self, target: str, dtype: str, case: str, round_: int | None, error: object) -> None:
        """Keeps an error as a row of its own; it never becomes a number."""
        row = {"target": target, "dtype": dtype, "case": case, "round": round_}
        self.errors.append({**row, "error": str(error)})

    def as_json(self) -> dict[str, Any]:
        """The whole run; `rows` carry every raw value beside median, minimum and maximum."""
        rows = [
            {
                "target": target,
                "dtype": dtype,
                "metric": metric,
                "unit": METRICS[metric].unit,
                "higher_is_better": METRICS[metric].higher,
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
                "values": values,
            }
            for (target, dtype, metric), values in self.values.items()
        ]
        return {
            "version": VERSION,
            "command": "engine",
            "status": self.status,
            "manifest": self.manifest,
            "rows": rows,
            "errors": self.errors,
        }

    def save(self) -> None:
        """Writes the file; a reader sees the old or the new one, never a part."""
        write_json(self.path, self.as_json())


def write_json(path: Path, value: Any) -> None:
    """Writes `value` to `path`; a reader sees the old or the new file, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


def part_of(path: Path) -> Path:
    """Where a result is kept until it is a whole line of `path`."""
    return path.with_name(f"{path.name}.{os.getpid()}.json")


def append_json(path: Path, value: Any) -> None:
    """Adds `value` as one line to a file of results."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def require_writable(path: Path) -> None:
    """Makes the folder of a result and tries to write there, before anything is measured.

    Raises `ValueError` naming the folder.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"cannot write results to {path.parent}: {error.strerror}") from None


def read(path: Path) -> dict[str, Any]:
    """A saved run. Raises ValueError for a file that is none."""
    run = json.loads(path.read_text())
    if not isinstance(run, dict) or run.get("version") != VERSION or "rows" not in run:
        raise ValueError(f"{path.name} is no benchmark result of version {VERSION}")
    return run


def cells(run: Mapping[str, Any], dtype: str) -> tuple[list[str], dict[str, list[str]]]:
    """Metrics that occur for `dtype`, and per target one cell each: `median (min-max)`."""
    rows = {(r["target"], r["metric"]): r for r in run["rows"] if r["dtype"] == dtype}
    failed = [e["target"] for e in run["errors"] if e["dtype"] == dtype]
    metrics = [m for m in METRICS if any(metric == m for _, metric in rows)]
    targets = list(dict.fromkeys([target for target, _ in rows] + failed))
    table = {}
    for target in targets:
        row = [rows.get((target, metric)) for metric in metrics]
        table[target] = [
            "-" if r is None else _cell(r, METRICS[m].digits)
            for r, m in zip(row, metrics, strict=True)
        ]
    return metrics, table


def dtypes(run: Mapping[str, Any]) -> list[str]:
    """The dtypes of a run, in the order in which they were measured."""
    return list(dict.fromkeys(r["dtype"] for r in [*run["rows"], *run["errors"]]))


def markdown(run: Mapping[str, Any]) -> str:
    """One markdown table per dtype, the errors, and what was measured where."""
    blocks = []
    for dtype in dtypes(run):
        metrics, table = cells(run, dtype)
        head = [dtype, *(f"{METRICS[m].heading} ({METRICS[m].unit})" for m in metrics)]
        lines = [_line(head), _line(["---"] + ["---:"] * len(metrics))]
        lines += [_line([target, *row]) for target, row in table.items()]
        blocks.append("\n".join(lines))
    if run["errors"]:
        blocks.append("\n".join(f"- {text}" for text in _error_lines(run)))
    blocks.append(provenance(run))
    return "\n\n".join(blocks) + "\n"


def tables(run: Mapping[str, Any]) -> list[Table]:
    """The same as rich tables, for a terminal: metrics down, targets across."""
    shown = []
    for dtype in dtypes(run):
        metrics, table = cells(run, dtype)
        view = Table(
            title=f"{dtype}: median (min-max)", caption="\n".join(_error_lines(run, dtype))
        )
        view.add_column("metric")
        for target in table:
            view.add_column(target, justify="right", overflow="fold")
        for i, metric in enumerate(metrics):
            what = METRICS[metric]
            view.add_row(f"{what.heading}, {what.unit}", *(row[i] for row in table.values()))
        shown.append(view)
    return shown


def show(run: Mapping[str, Any]) -> None:
    """Prints `tables(run)`; 160 columns wide where there is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    for table in tables(run):
        console.print(table)


def provenance(run: Mapping[str, Any]) -> str:
    """One sentence that says which commit was measured on which machine, when, and how often."""
    manifest = run["manifest"]
    machine = manifest.get("machine", {})
    return (
        f"Commit {manifest.get('commit', 'unknown')}, {manifest.get('started', 'unknown')}, "
        f"{machine.get('cpu', 'unknown CPU')}, {manifest.get('threads', '?')} threads, "
        f"{manifest.get('rounds', '?')} rounds, load average before "
        f"{manifest.get('load_average_before', ['?'])[0]}; median (min-max); run {run['status']}."
    )


def _cell(row: Mapping[str, Any], digits: int) -> str:
    median, low, high = (f"{row[key]:.{digits}f}" for key in ("median", "min", "max"))
    return median if len(row["values"]) == 1 else f"{median} ({low}-{high})"


def _line(row: list[str]) -> str:
    return "| " + " | ".join(row) + " |"


def _error_lines(run: Mapping[str, Any], dtype: str | None = None) -> list[str]:
    return [
        f"{e['target']} {e['dtype']} {e['case']}: {e['error']}"
        for e in run["errors"]
        if dtype in (None, e["dtype"])
    ]
