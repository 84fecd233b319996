"""The README's tables of serving and of the offline commands, made from the committed results."""

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Run = Mapping[str, Any]
_NAMES = {
    "kvjax": "kvjax", "vllm": "vLLM", "transformers": "transformers",
    "transformers-batching": "the same, batching", "llamacpp": "llama.cpp",
}  # fmt: skip
_FIGURES = (  # key, row, factor, digits
    ("output_throughput", "output tokens/s", 1.0, 0),
    ("p99_ttft_ms", "first token, P99 (s)", 0.001, 2),
    ("median_ttft_ms", "first token, median (s)", 0.001, 2),
    ("median_tpot_ms", "per further token, median (ms)", 1.0, 0),
    ("cache_hit_rate", "prompt tokens cached (%)", 100.0, 0),
    ("same_outputs", "all tokens as kvjax's (% of requests)", 100.0, 0),
)


def serving(folder: Path) -> str:
    """Each workload that was run against peers: figures over all rounds, targets across."""
    newest: dict[str, Run] = {}
    for run in _runs(folder, "serve"):
        if run["peers"]:
            newest[run["manifest"]["workload"]["name"]] = run
    targets = [t for t in _NAMES if any(t in _sides(run) for run in newest.values())]
    lines = [line("", *(_NAMES[t] for t in targets)), "|---|" + "---:|" * len(targets)]
    for workload, run in newest.items():
        sides = _sides(run)
        for key, name, factor, digits in _FIGURES:
            cells = [_number(sides.get(t, {}).get(key), factor, digits) for t in targets]
            lines.append(line(f"{workload}: {name}", *cells))
    return "\n".join(lines) + "\n"


def offline(folder: Path) -> str:
    """The newest run of each of kvjax's own commands: its figures, and how near the ceilings."""
    heads = ("", "", "share of compute", "share of bandwidth", "padding", "peak MiB")
    lines = [line(*heads), "|---|---|" + "---:|" * 4]
    rows = {
        "latency": _latency, "throughput": _throughput, "serve": _trace, "startup": _startup,
    }  # fmt: skip
    for command, row in rows.items():
        runs = [run for run in _runs(folder, command) if not run.get("peers")]
        if runs:
            run = runs[-1]
            shares = [_number(run.get(f"share_of_{k}"), 1, 2) for k in ("compute", "bandwidth")]
            rest = [_number(run.get("padding_waste"), 1, 2), _number(run["peak_rss_mib"], 1, 0)]
            lines.append(line(f"`{command}`", row(run), *shares, *rest))
    return "\n".join(lines) + "\n"


def line(*cells: str) -> str:
    """One row of a markdown table."""
    return "| " + " | ".join(cells) + " |" if cells[0] else "| | " + " | ".join(cells[1:]) + " |"


def _latency(run: Run) -> str:
    sizes = run["manifest"]["sizes"]
    return (
        f"batch {sizes['batch_size']}, {sizes['input_len']} + {sizes['output_len']} tokens: "
        f"{run['avg_latency']:.2f} s ± {run['std_latency']:.2f}"
    )


def _throughput(run: Run) -> str:
    about = run["manifest"]["workload"]
    options = about["options"]
    return (
        f"{about['num_requests']} prompts, {options['input_len']} + {options['output_len']} "
        f"tokens: {run['tokens_per_second']:,.0f} tokens/s, "
        f"{run['output_tokens_per_second']:,.0f} of them output"
    )


def _trace(run: Run) -> str:
    about = run["manifest"]["workload"]
    name = about["options"]["trace"] if about["name"] == "trace" else about["name"]
    scale = f", lengths x {about['options']['trace_scale']}" if about["name"] == "trace" else ""
    return (
        f"{about['num_requests']} requests of {name}{scale}: first token "
        f"{run['median_ttft_ms']:.0f} ms (median), {run['p99_ttft_ms']:.0f} (P99), "
        f"{100 * run['cache_hit_rate']:.0f} % cached"
    )


def _startup(run: Run) -> str:
    times = [
        f"{statistics.fmean(run[f'{kind}_first_token_times']):.1f} s {name}"
        for kind, name in (("cold", "with nothing compiled before"), ("warm", "else"))
        if run[f"{kind}_first_token_times"]
    ]
    return f"first token after {', '.join(times)}"


def _sides(run: Run) -> dict[str, Run]:
    return {run["backend"]: run, **run["peers"]}


def _number(value: float | None, factor: float, digits: int) -> str:
    return "" if value is None else f"{factor * value:,.{digits}f}"


def _runs(folder: Path, command: str) -> Iterator[Run]:
    for path in sorted(folder.glob(f"{command}-*.json"), key=lambda path: path.stem[-15:]):
        yield json.loads(path.read_text(encoding="utf-8"))
