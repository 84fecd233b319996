"""From records to figures: throughput, latencies and their percentiles, goodput, reuse.

Keys and definitions are those of `vllm bench serve` where it has them: TPOT is (E2EL - TTFT) /
(tokens - 1) of a request, percentiles are numpy's (linear), standard deviations are the
population's. Figures that nothing was measured for are None.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvjax.benchmarks.client import Record

METRICS = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}
QUEUE_METRICS = {  # only where they are asked for and a concurrency cap makes requests wait
    "client_queue_time": "Client Queue Time",
    "e2el_including_client_queue": "E2EL incl. Client Queue",
}
_TITLES = {
    "ttft": "Time to First Token", "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency", "e2el": "End-to-end Latency",
    **QUEUE_METRICS,
}  # fmt: skip

_PROBES = {
    "completed": "Probe requests completed", "failed": "Probe requests failed",
    "median_e2el_ms": "Median probe E2EL (ms)", "p99_e2el_ms": "P99 probe E2EL (ms)",
    "max_e2el_ms": "Max probe E2EL (ms)",
}  # fmt: skip


def figures(
    records: Sequence[Record],
    duration: float,
    *,
    percentiles: Sequence[float] = (99,),
    goodput: Mapping[str, float] | None = None,
    queue: Sequence[str] = (),
) -> dict[str, Any]:
    """The figures of a run of `duration` seconds.

    `goodput`: metric -> most milliseconds; a request counts if it meets all of them. `queue`: which
    of `QUEUE_METRICS` are wanted.
    """
    done = [r for r in records if not r.error and r.e2el is not None]
    inputs, outputs = sum(r.input_len for r in done), sum(r.output_len for r in done)
    found: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(records) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / duration,
        "request_goodput": None,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
        "max_output_tokens_per_s": busiest_second(done),
        "max_concurrent_requests": most_at_once(done),
        **reused(done),
    }
    if goodput:
        good = sum(all(_meets(r, m, most) for m, most in goodput.items()) for r in done)
        found["request_goodput"] = good / duration
    for metric in (*METRICS, *queue):
        values = milliseconds(done, metric)
        statistics = {"mean": np.mean, "median": np.median, "std": np.std}
        for name, function in statistics.items():
            found[f"{name}_{metric}_ms"] = float(function(values)) if values else None
        for p in percentiles:
            value = float(np.percentile(values, p)) if values else None
            found[f"p{p:g}_{metric}_ms"] = value
    return found


def milliseconds(records: Sequence[Record], metric: str) -> list[float]:
    """All values of one metric; those of one-token answers have no TPOT."""
    match metric:
        case "ttft":
            seconds = [r.ttft for r in records if r.ttft is not None]
        case "itl":
            seconds = [gap for r in records for gap in r.itl]
        case "e2el":
            seconds = [r.e2el for r in records if r.e2el is not None]
        case "client_queue_time":
            seconds = [r.queued for r in records]
        case "e2el_including_client_queue":
            seconds = [r.queued + r.e2el for r in records if r.e2el is not None]
        case _:
            seconds = [t for r in records if (t := per_output_token(r)) is not None]
    return [1000 * s for s in seconds]


def per_output_token(record: Record) -> float | None:
    """Seconds per token after the first; None for a single token."""
    if record.ttft is None or record.e2el is None or record.output_len < 2:
        return None
    return (record.e2el - record.ttft) / (record.output_len - 1)


def most_at_once(records: Sequence[Record]) -> int:
    """Requests that were running at the same time, at most."""
    ends = [(r.sent + (r.e2el or 0.0), -1) for r in records]
    running = most = 0
    for _, step in sorted([*((r.sent, 1) for r in records), *ends]):
        running += step
        most = max(most, running)
    return most


def busiest_second(records: Sequence[Record]) -> float:
    """Most streamed outputs within one second, counted from the start in whole seconds."""
    times: list[float] = []
    for r in records:
        if r.ttft is not None:
            times += list(r.sent + r.ttft + np.cumsum([0.0, *r.itl]))
    return float(np.bincount(np.asarray(times, np.int64)).max()) if times else 0.0


def reused(records: Sequence[Record]) -> dict[str, Any]:
    """Prompt tokens by how their KV came; None where the target does not tell.

    The hit rate is of exact hits. Passages that are encoded when a prompt first has them count as
    stored for that prompt already.
    """
    inputs = sum(r.input_len for r in records)

    def total(name: str) -> int | None:
        values = [getattr(r, name) for r in records]
        return None if not values or None in values else round(sum(values))

    cached = total("cached")
    hits = None if cached is None or not inputs else cached / inputs
    return {
        "total_cached_tokens": cached,
        "total_shifted_tokens": total("shifted"),
        "total_recomputed_tokens": total("recomputed"),
        "cache_hit_rate": hits,
    }


def probed(records: Sequence[Record]) -> dict[str, Any]:
    """Figures of the requests that were sent beside the load; nothing where there were none."""
    times = milliseconds([r for r in records if not r.error], "e2el")
    if not times:
        return {}
    return {
        "probe_completed": len(times),
        "probe_failed": len(records) - len(times),
        "probe_median_e2el_ms": float(np.median(times)),
        "probe_p99_e2el_ms": float(np.percentile(times, 99)),
        "probe_max_e2el_ms": max(times),
    }


def details(records: Sequence[Record], texts: bool = False) -> dict[str, Any]:
    """One entry per request, failed ones included: None for what they have not."""
    rows = {
        "input_lens": [r.input_len for r in records],
        "output_lens": [r.output_len for r in records],
        "ttfts": [r.ttft for r in records],
        "itls": [r.itl for r in records],
        "latencies": [r.e2el for r in records],
        "start_times": [r.sent for r in records],
        "queue_times": [r.queued for r in records],
        "cached_tokens": [r.cached for r in records],
        "errors": [r.error or ("" if r.e2el is not None else "not finished") for r in records],
    }
    return {**rows, **({"generated_texts": [r.text for r in records]} if texts else {})}


def show(found: Mapping[str, Any], title: str = "Serving Benchmark Result") -> str:
    """The figures as `vllm bench serve` prints them, and the ones of ours behind."""
    lines = [f"{' ' + title + ' ':=^50}"]

    def line(heading: str, key: str, digits: int | None = None) -> None:
        value = found.get(key)
        if value is not None:
            text = str(value) if digits is None else f"{value:.{digits}f}"
            lines.append(f"{heading + ':':<40} {text:<10}".rstrip())

    line("Successful requests", "completed")
    line("Failed requests", "failed")
    line("Maximum request concurrency", "max_concurrency")
    line("Benchmark duration (s)", "duration", 2)
    line("Total input tokens", "total_input_tokens")
    line("Total generated tokens", "total_output_tokens")
    line("Request throughput (req/s)", "request_throughput", 2)
    line("Request goodput (req/s)", "request_goodput", 2)
    line("Output token throughput (tok/s)", "output_throughput", 2)
    line("Peak output token throughput (tok/s)", "max_output_tokens_per_s", 2)
    line("Peak concurrent requests", "max_concurrent_requests")
    line("Total token throughput (tok/s)", "total_token_throughput", 2)
    for metric, name in {**METRICS, **QUEUE_METRICS}.items():
        if metric in QUEUE_METRICS and f"mean_{metric}_ms" not in found:
            continue
        lines.append(f"{_TITLES[metric]:-^50}")
        line(f"Mean {name} (ms)", f"mean_{metric}_ms", 2)
        line(f"Median {name} (ms)", f"median_{metric}_ms", 2)
        for key in found:
            if key.startswith("p") and key.endswith(f"_{metric}_ms") and key[1].isdigit():
                line(f"{key.split('_')[0].upper()} {name} (ms)", key, 2)
    lines.append(f"{'KV Reuse and Engine':-^50}")
    line("Cached prompt tokens", "total_cached_tokens")
    line("Shifted prompt tokens", "total_shifted_tokens")
    line("Recomputed prompt tokens", "total_recomputed_tokens")
    line("Cache hit rate", "cache_hit_rate", 3)
    line("Peak memory (MiB)", "peak_rss_mib", 0)
    line("Peak device memory (MiB)", "peak_device_mib", 0)
    line("Programs compiled during the run", "compiles")
    line("Compile time before the run (s)", "compile_seconds", 2)
    line("Padding waste (share of rows)", "padding_waste", 3)
    line("Share of compute ceiling", "share_of_compute", 3)
    line("Share of bandwidth ceiling", "share_of_bandwidth", 3)
    for key, name in _PROBES.items():
        line(f"{name}", f"probe_{key}", 2 if key.endswith("_ms") else None)
    lines.append("=" * 50)
    return "\n".join(lines)


def _meets(record: Record, metric: str, most_ms: float) -> bool:
    values = milliseconds([record], metric)
    return not values or max(values) <= most_ms
