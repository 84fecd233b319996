"""Libraries of structured output side by side: llguidance, which kvjax uses, and xgrammar.

Grammars of several kinds and sizes over the model's tokenizer: seconds to compile one, seconds for
the mask of one row and for all rows of a step, all of it for one batch of answers to a new grammar
(`whole_s`), and which texts are let through. Each library runs
in a process of an environment of its own (`python benchmarks/peers/install.py xgrammar DIR`), a
round at a time in turns. No model runs.
"""

import argparse
import base64
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kvjax
from kvjax.benchmarks import engine, manifest
from kvjax.benchmarks.grammar_cases import Case, cases
from kvjax.benchmarks.peers import HERE
from kvjax.benchmarks.peers.grammar_worker import open_tokenizer
from kvjax.benchmarks.results import require_writable, write_json
from kvjax.models.tokenizers import Tokenizer

VERSION = 1
LIBRARIES = ("llguidance", "xgrammar")
ROOT = str(Path(kvjax.__path__[0]).absolute().parent)
WORKER = HERE / "grammar_worker.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `kvjax bench grammar`."""
    parser.add_argument("--libraries", type=engine.one_of(LIBRARIES), default=[*LIBRARIES])
    parser.add_argument("--model", default=engine.MODEL, help="whose tokenizer is used")
    parser.add_argument("--rows", type=int, default=16, help="sequences of a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small grammars only")
    parser.add_argument(
        "--peer-env", action="append", default=[], metavar="NAME=PATH", help="xgrammar's"
    )
    parser.add_argument("--out", type=Path, default=Path("bench-results/grammar.json"))


def run(args: argparse.Namespace) -> int:
    """Measures; 0, or 1 if a library could not compile a case."""
    require_writable(args.out)
    pythons = {
        name: Path(sys.executable)
        if name == "llguidance"
        else engine.environment_python(name, engine.split_pairs(args.peer_env, "--peer-env"))
        for name in args.libraries
    }
    tokenizer = open_tokenizer(args.model)
    chosen = cases(args.rows, quick=args.quick)
    task = make_task(args.model, tokenizer, chosen, rows=args.rows, threads=args.threads)
    record: dict[str, Any] = {
        "version": VERSION,
        "command": "grammar",
        "status": "running",
        "manifest": manifest.base("grammar")
        | {
            "model": {"name": Path(args.model).name},
            "tokenizer": tokenizer.fingerprint,
            "vocabulary": len(task["vocabulary"]),
            "threads": args.threads,
            "rounds": args.rounds,
            "rows": args.rows,
            "targets": {},
        },
        "rows": [],
    }
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    for _ in range(args.rounds):
        for name, python in pythons.items():
            answers[name].append(ask(python, name, task))
            record["manifest"]["targets"][name] = {
                "versions": answers[name][0]["versions"],
                "load_s": [a["load_s"] for a in answers[name]],
            }
            record["rows"] = rows(chosen, answers)
            write_json(args.out, record)
    record["status"] = "complete"
    write_json(args.out, record)
    for row in record["rows"]:
        print(line(row), flush=True)
    return int(any("error" in row for row in record["rows"]))


def make_task(
    model: str, tokenizer: Tokenizer, chosen: Sequence[Case], *, rows: int, threads: int
) -> dict[str, Any]:
    """What a worker is told."""
    size = tokenizer.vocab_size
    return {
        "model": model,
        "vocabulary": [base64.b64encode(tokenizer.token_bytes(i)).decode() for i in range(size)],
        "special": sorted(tokenizer.special_ids),
        "end": list(tokenizer.eos_token_ids),
        "rows": rows,
        "threads": threads,
        "cases": [
            dataclasses.asdict(case)
            | {
                name: [tokenizer.encode(text, False) for text in getattr(case, name)]
                for name in ("fitting", "unfitting")
            }
            for case in chosen
        ],
    }


def ask(python: Path, library: str, task: dict[str, Any]) -> dict[str, Any]:
    """One worker's answer. Raises `ValueError` with what it printed if it failed."""
    done = subprocess.run(
        [str(python), str(WORKER), library],
        input=json.dumps(task), capture_output=True, text=True, check=False,
        env=os.environ | ({"PYTHONPATH": ROOT} if library == "llguidance" else {"PYTHONPATH": ""}),
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"{library}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def rows(chosen: Sequence[Case], answers: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per library and case, over all rounds so far."""
    found = []
    for library, rounds in answers.items():
        for number, case in enumerate(chosen):
            told = [answer["cases"][number] for answer in rounds]
            row: dict[str, Any] = {"library": library, "case": case.name, "kind": case.kind}
            row["spec_bytes"] = len(case.spec if isinstance(case.spec, str) else
                                    json.dumps(case.spec))  # fmt: skip
            errors = [one["error"] for one in told if "error" in one]
            if errors:
                found.append({**row, "error": errors[0]})
                continue
            if told:
                found.append({**row, **_numbers(case, told)})
    return found


def _numbers(case: Case, told: list[dict[str, Any]]) -> dict[str, Any]:
    pooled = {
        name: [s for one in told for s in one[name]]
        for name in ("mask_s", "step_s", "step_in_threads_s")
    }
    return {
        "compile_s": [one["compile_s"] for one in told],
        "whole_s": [one["compile_s"] + sum(one["step_s"]) for one in told],
        **{name: spread(values) for name, values in pooled.items()},
        "fitting": len(case.fitting),
        "fitting_accepted": min(one["fitting_accepted"] for one in told),
        "unfitting": len(case.unfitting),
        "unfitting_refused": min(one["unfitting_refused"] for one in told),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Number, median, 99th percentile and maximum."""
    ordered = sorted(values)
    last = min(len(ordered) - 1, int(0.99 * len(ordered)))
    return {
        "count": len(ordered),
        "median": statistics.median(ordered),
        "p99": ordered[last],
        "max": ordered[-1],
    }


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    head = f"{row['case']:22} {row['library']:11}"
    if "error" in row:
        return f"{head} {row['error'][:80]}"
    mask, step, threads = (row[n] for n in ("mask_s", "step_s", "step_in_threads_s"))
    return (
        f"{head} compile {1e3 * statistics.median(row['compile_s']):9.2f} ms  "
        f"mask {1e6 * mask['median']:7.1f} us, p99 {1e6 * mask['p99']:8.1f}  "
        f"step {1e3 * step['median']:6.2f} ms, p99 {1e3 * step['p99']:7.2f}  "
        f"in threads {1e3 * threads['median']:6.2f}  "
        f"accepted {row['fitting_accepted']}/{row['fitting']}  "
        f"refused {row['unfitting_refused']}/{row['unfitting']}"
    )
