"""Flags that the latency, throughput, serve and startup benchmarks share: names are vLLM's."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from kvjax.benchmarks.workloads import WORKLOADS, Options
from kvjax.benchmarks.workloads.traces import TRACES

MODEL = "smollm2-135m"
FOLDER = Path("bench-results")
_QUICK = {"num_prompts": 12, "input_len": 64, "output_len": 12, "prefix_len": 64, "context_len": 32}
_QUICK_ENGINE = {"max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 128}
_OTHER_NAMES = {  # of vllm bench's and SGLang's data sets for the same requests
    "prefix_repetition": "shared-prefix", "generated-shared-prefix": "shared-prefix",
    "timed_trace": "trace",
}  # fmt: skip
_LENGTHS: tuple[tuple[str, tuple[str, ...], Any, str], ...] = (
    ("num_prompts", (), int, "requests (all of a file; 64 of others)"),
    ("input_len", ("--random-input-len", "--prefix-repetition-suffix-len"), int, "tokens (256)"),
    ("output_len", ("--random-output-len", "--prefix-repetition-output-len"), int, "tokens (32)"),
    ("range_ratio", ("--random-range-ratio",), float, "spread of both lengths, in [0, 1)"),
    ("prefix_len", ("--prefix-repetition-prefix-len",), int, "tokens that a group shares (512)"),
    ("num_prefixes", ("--prefix-repetition-num-prefixes",), int, "groups (4)"),
    ("context_len", (), int, "tokens of a document of long-document (256)"),
    ("num_contexts", (), int, "documents of long-document (4)"),
    ("prefix_ratio", (), float, "of input_len, in front of the breaker of prefix-suffix (0.5)"),
    ("vocab_size", (), int, "generated ids are below it (32000)"),
    ("trace", ("--dataset-path",), str, f"of {', '.join(TRACES)}, or a file"),
    ("trace_scale", (), Fraction, "of a trace's lengths (1/64)"),
    ("trace_speed", (), float, "of a trace's clock (1)"),
)


def add_workload(parser: argparse.ArgumentParser) -> None:
    """The workload and its sizes; what is left out has the workload's default."""
    group = parser.add_argument_group("workload")
    names = ", ".join(WORKLOADS)
    group.add_argument("--dataset-name", "--workload", default="random", help=f"of {names}")
    for name, others, kind, text in _LENGTHS:
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, *others, dest=name, type=kind, default=None, help=text)
    group.add_argument("--seed", type=int, default=0, help="of prompts and arrivals (0)")
    group.add_argument("--quick", action="store_true", help="small sizes: under two minutes")


def add_engine(parser: argparse.ArgumentParser, model: str | None = MODEL) -> None:
    """The model and its engine in this process."""
    group = parser.add_argument_group("engine")
    group.add_argument("--model", default=model, help=f"a path or a name ({MODEL})")
    group.add_argument("--dtype", default="bfloat16", help="float32, bfloat16 or int8 (bfloat16)")
    for name in _QUICK_ENGINE:
        group.add_argument(f"--{name.replace('_', '-')}", type=int, default=None)
    group.add_argument(
        "--engine-option",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="any other argument of kvjax.LLM, e.g. kv_cache_dtype='\"int8\"'",
    )


def add_results(parser: argparse.ArgumentParser, name: str) -> None:
    """Where the result of a benchmark without a name of its own goes."""
    parser.add_argument(
        "--output-json", "--out", type=Path, default=FOLDER / f"{name}.json", dest="output_json"
    )


def workload(args: argparse.Namespace) -> tuple[str, Options]:
    """The workload's name and options. Raises `ValueError` for values out of range."""
    given = {name: getattr(args, name) for name, *_ in _LENGTHS}
    chosen = {**(_QUICK if args.quick else {}), **{k: v for k, v in given.items() if v is not None}}
    name = _OTHER_NAMES.get(args.dataset_name, args.dataset_name)
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}; there are {', '.join(WORKLOADS)}")
    return name, Options(seed=args.seed, **chosen)


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `kvjax.LLM` beside the model."""
    from kvjax.config import EngineConfig

    given = {name: getattr(args, name) for name in _QUICK_ENGINE}
    settings: dict[str, Any] = {"dtype": args.dtype, "seed": getattr(args, "seed", 0)}
    settings |= _QUICK_ENGINE if args.quick else {}
    settings |= {k: v for k, v in given.items() if v is not None}
    for item in args.engine_option:
        name, _, value = item.partition("=")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"--engine-option wants NAME=JSON, got {item!r}") from None
    EngineConfig().replaced(settings)  # before anything is loaded
    return settings


def pairs(items: Sequence[str], option: str, separator: str = "=") -> dict[str, str]:
    """`NAME=VALUE` arguments as a dict. Raises `ValueError` naming the option."""
    found = {}
    for item in items:
        name, _, value = item.partition(separator)
        if not name or not value:
            raise ValueError(f"{option} wants NAME{separator}VALUE, got {item!r}")
        found[name] = value
    return found


def about(name: str, options: Options, requests: Sequence[Any]) -> dict[str, Any]:
    """The manifest's part on a workload: equal ones are equal work."""
    from kvjax.benchmarks.workloads import digest
    from kvjax.benchmarks.workloads.sharing import count

    shared = count(requests)
    fields = {k: str(v) if isinstance(v, Fraction) else v for k, v in vars(options).items()}
    fields["trace"] = Path(options.trace).name
    return {
        "name": name,
        "num_requests": len(requests),
        "sha256": digest(requests),
        "options": {f.name: fields[f.name] for f in dataclasses.fields(options)},
        "prefix_share": shared.prefix_share,
        "passage_share": shared.passage_share,
    }
