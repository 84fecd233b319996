"""The flags of `kvjax bench serve`, and what is made of them. Names are `vllm bench serve`'s."""

import argparse
import datetime
import itertools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvjax.benchmarks import flags, serve_peers
from kvjax.benchmarks.arrivals import Arrivals
from kvjax.benchmarks.figures import METRICS, QUEUE_METRICS

BACKENDS = {  # --backend -> the endpoint of its requests; None: in this process
    "kvjax": None,
    "openai": "/v1/completions",
    "vllm": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
}
_SAMPLING = {
    "temperature": float, "top_p": float, "top_k": int, "min_p": float,
    "presence_penalty": float, "frequency_penalty": float, "repetition_penalty": float,
    "logprobs": int,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `kvjax bench serve`."""
    _add_target(parser)
    flags.add_engine(parser, model=None)
    flags.add_workload(parser)
    load = parser.add_argument_group("load")
    load.add_argument("--request-rate", type=float, default=math.inf, help="per second (inf)")
    load.add_argument("--burstiness", type=float, default=1.0, help="1: Poisson; less: burstier")
    load.add_argument("--max-concurrency", type=int, help="requests running at the same time")
    load.add_argument("--ramp-up-strategy", choices=("linear", "exponential"))
    load.add_argument("--ramp-up-start-rps", type=float, default=1.0)
    load.add_argument("--ramp-up-end-rps", type=float, default=1.0)
    load.add_argument("--self-timed", action="store_true", help="sent when the trace says")
    load.add_argument("--num-warmups", type=int, help="requests that do not count (1; 4 for peers)")
    load.add_argument("--rounds", type=int, help="runs of the whole load (1; 3 with peers)")
    load.add_argument(
        "--probe-request-rate", type=float, default=0.0,
        help="one-token requests per second beside the load, beyond the concurrency cap (none)",
    )  # fmt: skip
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction, default=True)
    for name, kind in _SAMPLING.items():
        sampling.add_argument(f"--{name.replace('_', '-')}", type=kind)
    sampling.add_argument("--use-beam-search", action="store_true", help="of a server that can")
    serve_peers.add_arguments(parser)
    _add_output(parser)


def _add_target(parser: argparse.ArgumentParser) -> None:
    target = parser.add_argument_group("target")
    target.add_argument(
        "--backend", choices=BACKENDS, help="kvjax in this process, or openai with a URL or port"
    )
    target.add_argument("--base-url", help="of an OpenAI-compatible server")
    target.add_argument("--host", help="its host instead (127.0.0.1)")
    target.add_argument("--port", type=int, help="its port instead (8000)")
    target.add_argument("--endpoint", help="/v1/completions or /v1/chat/completions")
    target.add_argument("--header", action="append", default=[], metavar="NAME=VALUE")
    target.add_argument("--insecure", action="store_true", help="do not check certificates")
    target.add_argument("--extra-body", default="{}", metavar="JSON", help="added to each request")
    target.add_argument("--served-model-name", help="the model's name for the server")
    target.add_argument("--tokenizer", help="texts are sent as its ids (peers: the model's)")
    target.add_argument("--tokenizer-mode", choices=("auto",), default="auto")
    target.add_argument("--chat-template-kwargs", metavar="JSON", help="sent with each request")
    target.add_argument("--lora-modules", nargs="+", default=[], help="asked for instead of model")
    target.add_argument("--lora-assignment", choices=("random", "round-robin"), default="random")
    target.add_argument("--ready-check-timeout-sec", type=float, default=0.0)
    target.add_argument("--reuse", help="strategy for passages, e.g. epic (in this process)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("results")
    output.add_argument("--percentile-metrics", default=",".join(METRICS), metavar="METRICS")
    output.add_argument("--metric-percentiles", default="90,95,99", metavar="P,P")
    output.add_argument("--goodput", nargs="+", default=[], metavar="METRIC:MS")
    output.add_argument("--save-result", action="store_true", help="always so; for scripts")
    output.add_argument("--save-detailed", action="store_true", help="the generated texts, too")
    output.add_argument("--append-result", action="store_true", help="a line of a .jsonl of many")
    output.add_argument("--result-dir", type=Path, default=flags.FOLDER)
    output.add_argument("--result-filename")
    output.add_argument("--profile", action="store_true", help="a trace of the target's device")
    output.add_argument("--plot-timeline", action="store_true", help="a page of the requests")
    output.add_argument("--plot-dataset-stats", action="store_true", help="a page of the lengths")
    output.add_argument("--disable-tqdm", action="store_true", help="no progress bars")
    output.add_argument("--label", help="first part of the file's name (the backend)")
    output.add_argument("--metadata", nargs="*", default=[], metavar="NAME=VALUE")


def backend(args: argparse.Namespace) -> str:
    """The one named, or the one that the address implies. Raises `ValueError` if they clash."""
    addressed = args.base_url or args.host or args.port
    chosen = args.backend or ("openai" if addressed else "kvjax")
    if addressed and BACKENDS[chosen] is None:
        raise ValueError(f"the backend {chosen} runs in this process: leave --base-url out")
    in_process = BACKENDS[chosen] is None
    if args.reuse and not in_process:
        raise ValueError("--reuse is for the backend kvjax: a server has its own setting")
    for name in ("use_beam_search", "lora_modules", "chat_template_kwargs"):
        if in_process and getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is for a server: give its URL")
    if args.peer and (args.profile or args.probe_request_rate or args.logprobs is not None):
        raise ValueError("--profile, --probe-request-rate and --logprobs are for one target alone")
    return chosen


def base_url(args: argparse.Namespace) -> str:
    """The server's address."""
    return args.base_url or f"http://{args.host or '127.0.0.1'}:{args.port or 8000}"


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of `SamplingParams`, and of a request's body, that were given."""
    given = {n: v for n in _SAMPLING if (v := getattr(args, n)) is not None}
    return {"ignore_eos": args.ignore_eos, **given}


def body(args: argparse.Namespace, endpoint: str) -> dict[str, Any]:
    """What every request to a server has beside its prompt; false switches are left out."""
    found = {k: v for k, v in sampling(args).items() if v is not False}
    if args.logprobs is not None and "/chat/" in endpoint:
        found |= {"logprobs": True, "top_logprobs": args.logprobs}
    if args.use_beam_search:
        found["use_beam_search"] = True
    if args.chat_template_kwargs is not None:
        text = args.chat_template_kwargs
        found["chat_template_kwargs"] = _object(text, "--chat-template-kwargs")
    return found | _object(args.extra_body, "--extra-body")


def _object(text: str, option: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{option} must be an object, got {text}")
    return value


def adapters(args: argparse.Namespace) -> Iterator[str] | None:
    """The adapter of each request in turn, asked for as its model; None without any."""
    if not args.lora_modules:
        return None
    if args.lora_assignment == "round-robin":
        return itertools.cycle(args.lora_modules)
    rng = random.Random(args.seed)
    return (rng.choice(args.lora_modules) for _ in itertools.count())


def arrivals(args: argparse.Namespace) -> Arrivals:
    """The process of arrivals. Raises `ValueError` for values out of range."""
    names = ("request_rate", "burstiness", "ramp_up_strategy", "ramp_up_start_rps",
             "ramp_up_end_rps", "self_timed")  # fmt: skip
    return Arrivals(**{name: getattr(args, name) for name in names})


def percentiles(args: argparse.Namespace) -> list[float]:
    """`--metric-percentiles`. Raises `ValueError` for what is none."""
    try:
        found = [float(p) for p in args.metric_percentiles.split(",")]
    except ValueError:
        raise ValueError(f"--metric-percentiles: {args.metric_percentiles!r}") from None
    if not all(0 <= p <= 100 for p in found):
        raise ValueError(f"--metric-percentiles must be in [0, 100], got {found}")
    return found


def metrics(args: argparse.Namespace) -> list[str]:
    """`--percentile-metrics`. Raises `ValueError` for an unknown one."""
    found = args.percentile_metrics.split(",")
    known = [*METRICS, *QUEUE_METRICS]
    if unknown := [m for m in found if m not in known]:
        raise ValueError(f"--percentile-metrics: unknown {unknown}; there are {known}")
    return found


def goodput(args: argparse.Namespace) -> dict[str, float]:
    """Metric -> most milliseconds. Raises `ValueError` for an unknown metric or no number."""
    found = {}
    for name, value in flags.pairs(args.goodput, "--goodput", ":").items():
        try:
            found[name] = float(value)
        except ValueError:
            raise ValueError(f"--goodput {name} wants milliseconds, got {value!r}") from None
        if name not in METRICS or not found[name] > 0:
            raise ValueError(f"--goodput wants {list(METRICS)} and positive times, got {name}")
    return found


def path(args: argparse.Namespace, backend: str, model: str) -> Path:
    """The result's file; its name is made as vLLM's is, unless it was given."""
    if args.result_filename:
        return args.result_dir / args.result_filename
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    cap = f"-concurrency{args.max_concurrency}" if args.max_concurrency else ""
    label = args.label or backend
    name = f"{label}-{args.request_rate}qps{cap}-{Path(model).name}-{stamp}.json"
    return args.result_dir / name
