"""`kvjax bench startup`: a new process until its model is loaded, and until its first token.

Cold starts have an empty cache of compiled programs, warm ones find what the last start compiled.
Keys are `vllm bench startup`'s where it has them; the files of the model are in the system's cache
after the first start, so that it is left out with `--num-iters-warmup`.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kvjax
from kvjax.benchmarks import flags, manifest, results
from kvjax.benchmarks.peers import TARGETS
from kvjax.benchmarks.workers import Target, Worker

_PROMPT_LEN = 16
_PARTS = ("startup", "compilation", "first_token")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `kvjax bench startup`."""
    flags.add_engine(parser)
    parser.add_argument("--num-iters-cold", type=int, help="(3; quick: 1)")
    parser.add_argument("--num-iters-warm", type=int, help="(3; quick: 1)")
    parser.add_argument("--num-iters-warmup", type=int, default=1, help="starts left out (1)")
    parser.add_argument("--compile-all", action="store_true", help="every program, not the needed")
    parser.add_argument("--quick", action="store_true", help="one start each, small sizes")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one answer")
    flags.add_results(parser, "startup")


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes. Raises `ValueError` before anything is started."""
    from kvjax.build import open_checkpoint

    results.require_writable(args.output_json)
    counts = {
        kind: 1 if args.quick and given is None else 3 if given is None else given
        for kind, given in (("cold", args.num_iters_cold), ("warm", args.num_iters_warm))
    }
    if min(*counts.values(), args.num_iters_warmup) < 0 or not any(counts.values()):
        raise ValueError(f"numbers of starts must not be negative or all 0, got {counts}")
    settings = flags.engine_settings(args)
    model = str(open_checkpoint(args.model).path)  # before the cache moves: it has the model, too
    about = manifest.base("startup")
    about["model"] = {"name": Path(args.model).name}
    about["sizes"] = {"compile_all": args.compile_all, "prompt_len": _PROMPT_LEN}
    record: dict[str, Any] = {
        "version": results.VERSION, "command": "startup", "status": "running", "manifest": about,
        **{f"{kind}_{part}_times": [] for kind in counts for part in _PARTS},
        "peak_rss_mib": None,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as shared:
        for number in range(args.num_iters_warmup):
            start(args, model, settings, Path(shared), about if number == 0 else None)
        for kind, count in counts.items():
            for _ in range(count):
                with tempfile.TemporaryDirectory() as empty:
                    folder = Path(empty if kind == "cold" else shared)
                    found = start(args, model, settings, folder, about)
                for part in _PARTS:
                    record[f"{kind}_{part}_times"].append(found[part])
                record["peak_rss_mib"] = max(found["peak_rss_mib"], record["peak_rss_mib"] or 0.0)
                record["programs"] = int(found["programs"])
                record |= summary(record)
                results.write_json(args.output_json, record)
    about["load_average_after"] = list(os.getloadavg())
    record["status"] = "complete"
    results.write_json(args.output_json, record)
    for kind in counts:
        for part in _PARTS:
            if values := record[f"{kind}_{part}_times"]:
                print(f"Avg {kind} {part.replace('_', ' ')} time: {statistics.mean(values):.2f} s")
    print(f"programs: {record['programs']}, peak memory: {record['peak_rss_mib']:.0f} MiB")
    print(f"results: {args.output_json}")
    return 0


def start(
    args: argparse.Namespace,
    model: str,
    settings: dict[str, Any],
    cache: Path,
    about: dict[str, Any] | None,
) -> dict[str, float]:
    """Seconds of one start; `cache` is the folder of compiled programs."""
    root = str(Path(kvjax.__path__[0]).absolute().parent)
    names = ("KVJAX_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR")
    target = Target(
        name="kvjax",
        python=Path(sys.executable),
        file=TARGETS["kvjax"].file,
        options={"model": model, "dtype": settings["dtype"], "llm_options": settings},
        env={"PYTHONPATH": root, **dict.fromkeys(names, str(cache))},
    )
    with Worker(target, timeout_s=args.timeout) as worker:
        worker.load(warm_up=args.compile_all)
        loaded = time.perf_counter() - worker.started
        worker.generate([list(range(1, 1 + _PROMPT_LEN))], 1)
        first = time.perf_counter() - worker.started
        compiled = worker.ask("counters")["counters"]
        if about is not None:
            about["engine"] = worker.ask("about")["about"]
            about["seed"] = settings["seed"]
        memory, programs = worker.peak_rss_mib(), compiled["compiles"]
    return {
        "startup": loaded, "first_token": first, "compilation": compiled["compile_seconds"],
        "peak_rss_mib": memory, "programs": programs,
    }  # fmt: skip


def summary(record: dict[str, Any]) -> dict[str, float]:
    """Means and deviations of the times so far."""
    found = {}
    for key, values in record.items():
        if key.endswith("_times") and values:
            name = key.removesuffix("s")
            found[f"avg_{name}"] = statistics.fmean(values)
            found[f"std_{name}"] = statistics.pstdev(values)
    return found
