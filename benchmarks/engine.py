"""`python -m benchmarks engine`: kvjax and its peers, the same work on one machine."""

import argparse
import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import kvjax
from kvjax.benchmarks import interleave, manifest, prompts, results
from kvjax.benchmarks.cases import CASES, SMOKE, START_UP, Sizes
from kvjax.benchmarks.peers import TARGETS, Peer, weights
from kvjax.benchmarks.results import Results
from kvjax.benchmarks.workers import Target
from kvjax.config import cache_dir
from kvjax.errors import KVJaxError

MODEL = "smollm2-135m"
DTYPES = ("float32", "bfloat16", "int8", "q4_1")


class PeerNotInstalled(KVJaxError, FileNotFoundError):
    """A target's virtual environment is not there; the message says how to make one."""


def peers_folder() -> Path:
    """Where peers' environments and their forms of the weights are looked for by default."""
    return cache_dir() / "peers"


def environment_python(name: str, given: Mapping[str, str]) -> Path:
    """The Python of a peer's environment: the one given for `name`, else the usual folder's.

    Raises PeerNotInstalled, with the command that installs the peer.
    """
    folder = Path(given.get(name, peers_folder() / name)).expanduser().absolute()
    python = folder / "bin" / "python"
    if not python.exists():
        raise PeerNotInstalled(
            f"{name}: no environment at {folder}. Make one with "
            f"`python benchmarks/peers/install.py {name} {folder}`, "
            f"or name one with --peer-env {name}=PATH"
        )
    return python


def kvjax_pythons(given: Sequence[str]) -> dict[str, Path]:
    """Target name -> Python for each `[LABEL=]PATH`; this Python, as `kvjax`, if there is none.

    A path without a label is named after the jax that is installed there.
    """
    found = {} if given else {"kvjax": Path(sys.executable)}
    for text in given:
        label, _, path = text.rpartition("=")
        python = Path(path).expanduser().absolute() / "bin" / "python"
        if not python.exists():
            raise PeerNotInstalled(f"kvjax: no environment at {path}: check --kvjax-env {text}")
        found[f"kvjax-{label or 'jax' + _jax_version(python)}"] = python
    return found


def split_pairs(items: Sequence[str], option: str) -> dict[str, str]:
    """`NAME=VALUE` arguments as a dict; raises ValueError naming the option."""
    pairs = {}
    for item in items:
        name, _, value = item.partition("=")
        if not name or not value:
            raise ValueError(f"{option} wants NAME=VALUE, got {item!r}")
        pairs[name] = value
    return pairs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `python -m benchmarks engine`."""
    parser.add_argument(
        "--targets",
        type=one_of(TARGETS),
        default=["kvjax"],
        help=f"of {','.join(TARGETS)}; or all",
    )
    parser.add_argument("--dtypes", type=one_of(DTYPES), default=["float32"], help=",".join(DTYPES))
    cases = [START_UP, *CASES]
    parser.add_argument("--cases", type=one_of(cases), default=cases, help=",".join(cases))
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each number")
    parser.add_argument("--threads", type=int, default=2, help="CPUs and threads of each target")
    parser.add_argument(
        "--peer-env", action="append", default=[], metavar="NAME=PATH", help="a peer's environment"
    )
    parser.add_argument(
        "--kvjax-env",
        action="append",
        default=[],
        metavar="[LABEL=]PATH",
        help="an environment that runs kvjax; several may be given (default: this one)",
    )
    parser.add_argument(
        "--kvjax-option",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="an argument of kvjax.LLM, e.g. max_num_batched_tokens=256",
    )
    parser.add_argument("--gguf", type=Path, help=f"the model's file (default: {MODEL}'s)")
    parser.add_argument("--weights", type=Path, help="folder for the forms of it that peers read")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="results folder")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one answer")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: whether it runs at all")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its tables; 0, or 1 if any target has an error row."""
    results.require_writable(args.out / "any")
    console = Console()
    gguf = args.gguf or _default_gguf()
    ids = prompts.tokenise(gguf)
    sizes = SMOKE if args.smoke else Sizes()
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    plan = interleave.Plan(
        cases=args.cases,
        rounds=args.rounds,
        sizes=sizes,
        token_ids=ids,
        timeout_s=args.timeout,
        log_folder=args.out / f"engine-{stamp}-logs",
    )
    env = thread_settings(args.threads)
    about = manifest.collect(
        threads=args.threads,
        rounds=args.rounds,
        dtypes=args.dtypes,
        cases=args.cases,
        sizes=dataclasses.asdict(sizes),
        prompt_ids=ids,
        model=gguf,
        env=env,
    )
    about["kvjax_options"] = args.kvjax_option
    out = Results(args.out / f"engine-{stamp}.json", about)
    targets = {dtype: find_targets(args, dtype, gguf, env, out) for dtype in args.dtypes}
    for row in out.errors:
        console.out(row["error"], highlight=False)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        interleave.run(targets, plan, out, lambda text: console.out(text, highlight=False))
    except KeyboardInterrupt:
        console.print("interrupted: what was measured is kept")
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
        results.show(out.as_json())
        console.out(f"results: {out.path}", highlight=False)
    return 1 if out.errors else 0


def thread_settings(threads: int) -> dict[str, str]:
    """Environment variables that hold the thread pools of all targets to `threads`."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**{name: str(threads) for name in names}, "TOKENIZERS_PARALLELISM": "false"}


def find_targets(
    args: argparse.Namespace, dtype: str, gguf: Path, env: Mapping[str, str], out: Results
) -> list[Target]:
    """The targets that can run `dtype`; the others get an error row that says why not.

    Makes the forms of the weights that are missing.
    """
    given = split_pairs(args.peer_env, "--peer-env")
    folder = args.weights or peers_folder() / "weights"
    found = []
    for name in args.targets:
        peer = TARGETS[name]
        options: dict[str, Any] = {"dtype": dtype, **peer.options}
        try:
            if dtype not in peer.weights:
                raise NotImplementedError(f"{name} has no {dtype} here")
            if name == "kvjax":
                pythons = kvjax_pythons(args.kvjax_env)
                options["llm_options"] = _llm_options(args.kvjax_option)
                root = str(Path(kvjax.__path__[0]).absolute().parent)
                extra = {"PYTHONPATH": root}
            else:
                pythons = {name: environment_python(peer.environment, given)}
                options["threads"] = args.threads
                extra = {"PYTHONPATH": ""}
        except (PeerNotInstalled, NotImplementedError) as why:
            out.fail(name, dtype, "load", None, why)
            continue
        options["model"] = str(weights.prepare(gguf, folder.expanduser(), peer.weights[dtype]))
        cpus = _cpus(args.threads)
        found += [
            _target(label, python, peer, options, {**env, **extra}, cpus)
            for label, python in pythons.items()
        ]
    return found


def _target(
    name: str,
    python: Path,
    peer: Peer,
    options: Mapping[str, Any],
    env: Mapping[str, str],
    cpus: Sequence[int],
) -> Target:
    return Target(
        name=name,
        python=python,
        file=peer.file,
        options=options,
        env=env,
        cpus=cpus,
        compiles=peer.compiles,
    )


def _default_gguf() -> Path:
    from kvjax.models.pull import pull

    return pull(MODEL)


def _llm_options(items: Sequence[str]) -> dict[str, Any]:
    return {k: json.loads(v) for k, v in split_pairs(items, "--kvjax-option").items()}


def _cpus(threads: int) -> list[int]:
    """The first `threads` CPUs this process may use; none (no pinning) where that is unknown."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    cpus = sorted(os.sched_getaffinity(0))
    if threads > len(cpus):
        raise ValueError(f"--threads {threads}: this process may use {len(cpus)} CPUs")
    return cpus[:threads]


def _jax_version(python: Path) -> str:
    code = "import importlib.metadata as m; print(m.version('jax'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if done.returncode != 0:
        raise PeerNotInstalled(f"kvjax: jax is not installed in {python.parent.parent}")
    return done.stdout.strip()


def one_of(known):
    """An argparse type: a comma-separated list of known names, or `all`."""

    def parse(text: str) -> list[str]:
        names = list(known) if text == "all" else text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {unknown}; there are {list(known)}")
        return names

    return parse
