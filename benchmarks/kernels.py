"""The kernels on the device at hand, beside its measured ceilings and other implementations.

Every row has seconds, bytes, FLOPs and their share of what a copy and a matrix product reach on the
same device in the same run. `bytes` and `flops` are the task's own, the least that any
implementation needs. The file is written after every case. `--tune` tries block sizes instead.
"""

import argparse
import dataclasses
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvjax.benchmarks import manifest
from kvjax.benchmarks.results import require_writable, write_json

VERSION = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `kvjax bench kernels`."""
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--cases", default="", help="only cases whose name has one of these words")
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tune", action="store_true", help="try block sizes and keep the best")
    parser.add_argument("--out", type=Path, default=Path("bench-results/kernels.json"))


def run(args: argparse.Namespace) -> int:
    """Measures what the arguments ask for on the default device."""
    import jax

    from kvjax.benchmarks import kernel_cases as cases

    require_writable(args.out)
    sizes = {"cpu": cases.CPU, "tpu": cases.TPU}.get(jax.default_backend(), cases.GPU)
    if args.quick:
        sizes = dataclasses.replace(sizes, **cases.QUICK)
    if args.tune:
        from kvjax.benchmarks import kernel_tuning

        return kernel_tuning.run(sizes, args.dtype, args.rounds)
    words = args.cases.split(",")
    chosen = [c for c in cases.cases(sizes, args.dtype) if any(w in c.name for w in words)]
    measure(chosen, sizes, args.dtype, args.rounds, args.out)
    return 0


def measure(chosen: list[Any], sizes: Any, dtype: str, rounds: int, out: Path) -> dict[str, Any]:
    """Runs the cases and returns the record, which `out` holds after every case."""
    from kvjax.benchmarks import ceilings

    record: dict[str, Any] = {
        "version": VERSION,
        "status": "running",
        "command": "kernels",
        "manifest": manifest.base("kernels"),
        "device": device(),
        "dtype": dtype,
        "rounds": rounds,
        "ceilings": ceilings.of(sizes, dtype, rounds),
        "rows": [],
        "not_compared": [],
        "errors": [],
    }
    for case in chosen:
        _run_case(case, record, dtype, rounds)
        write_json(out, record)
    record["status"] = "complete"
    write_json(out, record)
    return record


def _run_case(case: Any, record: dict[str, Any], dtype: str, rounds: int) -> None:
    """Adds a case's rows; an error becomes a row of its own and never a number."""
    about = {"case": case.name, **case.parameters}
    try:
        subjects = case.build()
        if case.compare:
            subjects += _peers(case, record, dtype, about)
        timed = [(s, Timer(s)) for s in subjects]
    except Exception as error:
        record["errors"].append({**about, "error": f"{type(error).__name__}: {error}"[:500]})
        print(f"{_title(about)}: {type(error).__name__}", flush=True)
        return
    seconds: dict[str, list[float]] = {s.name: [] for s in subjects}
    for subject, timer in timed:
        try:
            timer.warm_up()
        except Exception as error:
            row = {**about, "subject": subject.name}
            record["errors"].append({**row, "error": f"{type(error).__name__}: {error}"[:500]})
            del seconds[subject.name]
    for _ in range(rounds):  # interleaved, so that drift of the machine meets all alike
        for subject, timer in timed:
            if subject.name in seconds:
                seconds[subject.name].append(timer())
    for subject, _ in timed:
        if subject.name in seconds:
            row = _row(about, subject, seconds[subject.name], record["ceilings"])
            record["rows"].append(row)
            print(line(row), flush=True)


def _peers(case: Any, record: dict[str, Any], dtype: str, about: dict[str, Any]) -> list[Any]:
    from kvjax.benchmarks import kernel_peers

    found = []
    for name in kernel_peers.PEERS:
        try:
            found.append(kernel_peers.subject(name, case.heads, case.parameters, dtype))
        except kernel_peers.NotCompared as why:
            record["not_compared"].append({**about, "subject": name, "why": str(why)})
        except Exception as error:  # a peer's own limits are no failure of the run
            why = f"{type(error).__name__}: {error}"[:300]
            record["not_compared"].append({**about, "subject": name, "why": why})
    return found


class Timer:
    """Seconds per execution of a subject, in loops long enough for the clock.

    A jax subject loops inside one program, without the host. Others loop in Python, and a GPU of
    theirs is waited for at the end.
    """

    least = 0.02  # seconds of one timing

    def __init__(self, subject: Any) -> None:
        self.subject = subject
        self.count = 1
        self._loop = _jax_loop(subject) if subject.carry is not None else _host_loop(subject)

    def warm_up(self) -> None:
        """Compiles, then sets how many executions one timing has."""
        self._loop(1)
        seconds = self._time(1)
        self.count = max(1, min(1000, round(self.least / max(seconds, 1e-7))))
        self._loop(self.count)

    def _time(self, count: int) -> float:
        start = time.perf_counter()
        self._loop(count)
        return (time.perf_counter() - start) / count

    def __call__(self) -> float:
        return self._time(self.count)


def _jax_loop(subject: Any) -> Callable[[int], None]:
    import jax

    def loop(constants: Any, carry: Any, count: int) -> Any:
        return jax.lax.fori_loop(0, count, lambda _, c: subject.step(constants, c), carry)

    compiled = jax.jit(loop, static_argnums=2, donate_argnums=1)
    held = [subject.carry]
    subject.carry = None  # donated from now on

    def execute(count: int) -> None:
        held[0] = jax.block_until_ready(compiled(subject.constants, held[0], count))

    return execute


def _host_loop(subject: Any) -> Callable[[int], None]:
    def execute(count: int) -> None:
        out = None
        for _ in range(count):
            out = subject.step(subject.constants, None)
        if out is not None and getattr(out, "is_cuda", False):
            import torch  # type: ignore[import-not-found]

            torch.cuda.synchronize()

    return execute


def device() -> dict[str, Any]:
    """The device and the versions that the numbers depend on."""
    import importlib.metadata

    import jax

    from kvjax.pallas_kernels import OPERATIONS

    one = jax.devices()[0]
    versions = {}
    for name in ("jax", "jaxlib", "jax-cuda13-plugin", "libtpu", "torch", "flashinfer-python"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    names = ("paged_attention", "page_ops.copy_pages", "reposition", "attention_mass")
    return {
        "kind": one.device_kind,
        "platform": one.platform,
        "compute_capability": getattr(one, "compute_capability", None),
        "versions": versions,
        "python": platform.python_version(),
        "backends": {name: OPERATIONS[name].explain(one.platform) for name in names},
    }


def _row(about: dict[str, Any], subject: Any, seconds: list[float], ceilings: Any) -> dict:
    median = statistics.median(seconds)
    return {
        **about,
        "subject": subject.name,
        "seconds": seconds,
        "median": median,
        "min": min(seconds),
        "bytes": subject.bytes,
        "flops": subject.flops,
        "share_of_copy": subject.bytes / median / ceilings["copy"],
        "share_of_matmul": subject.flops / median / ceilings["matmul"],
    }


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    about = {k: v for k, v in row.items() if k in ("case", *_PARAMETERS)}
    return (
        f"{_title(about):46} {row['subject']:20} {row['median'] * 1e3:10.3f} ms  "
        f"{100 * row['share_of_copy']:6.1f} % of copy  "
        f"{100 * row['share_of_matmul']:6.1f} % of matmul"
    )


_PARAMETERS = ("batch", "context", "tokens", "requests", "prefix", "suffix")


def _title(about: dict[str, Any]) -> str:
    rest = ", ".join(f"{k} {v}" for k, v in about.items() if k != "case")
    return f"{about['case']} ({rest})"
