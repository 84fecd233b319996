"""`kvjax bench report RESULTS -o report.html`: one page with tables and plots, without a network.

Serving runs give the frontier of throughput against latency (a point per file, a line per target),
the distributions of the first token, and the share of prompts that was cached; kernels their place
under the device's ceilings; reuse its speed against its loss; the others their table.
"""

import argparse
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.benchmarks import reuse_results, reuse_table, samples, svg
from kvjax.benchmarks.svg import Series

Run = Mapping[str, Any]
_STYLE = (
    "body{font-family:sans-serif;max-width:60em;margin:2em auto;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .7em;border:1px solid #ccc;"
    "text-align:right}td:first-child,th:first-child{text-align:left}pre{overflow:auto}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `kvjax bench report`."""
    parser.add_argument("files", type=Path, nargs="+", help="results (.json; .jsonl of reuse)")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"))


def run(args: argparse.Namespace) -> int:
    """Writes the page. Raises `ValueError` for a file that is no result."""
    runs, reuse = {}, {}
    for path in args.files:
        if path.suffix == ".jsonl":
            reuse[path.name] = reuse_results.read(path)
        else:
            runs[path.name] = samples.read(path)
    args.output.write_text(page(runs, reuse), encoding="utf-8")
    print(f"report: {args.output}")
    return 0


def page(runs: Mapping[str, Run], reuse: Mapping[str, Any] | None = None) -> str:
    """The whole page: everything it needs is in it."""
    parts = [*_serving(runs), *_kernels(runs)]
    for name, results in (reuse or {}).items():
        parts += [f"<h2>{html.escape(name)}</h2>", reuse_plot(results)]
        parts.append(f"<pre>{html.escape(reuse_table.markdown(results))}</pre>")
    for name, one in runs.items():
        parts += [f"<h2>{html.escape(name)}</h2>", _about(one), _figures(one)]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>kvjax bench</title>'
        f"<style>{_STYLE}</style><h1>kvjax bench</h1>{''.join(parts)}</html>\n"
    )


def _serving(runs: Mapping[str, Run]) -> Iterator[str]:
    sides = [
        (name, target, part)
        for name, one in runs.items()
        if samples.command(one) == "serve" and one.get("completed")
        for target, part in [(one["backend"], one), *one.get("peers", {}).items()]
    ]
    points: dict[str, list[tuple[float, float]]] = {}
    for _, target, part in sides:
        if part.get("median_e2el_ms") is not None:
            at = (part["median_e2el_ms"], part["output_throughput"])
            points.setdefault(target, []).append(at)
    frontier = [Series(target, sorted(found)) for target, found in points.items()]
    yield svg.plot(
        "Throughput against latency", "median E2EL (ms)", "output tokens per second", frontier
    )
    first = []
    for name, target, part in sides:
        values = samples.per_request_ms(part).get("ttft", [])
        first.append(Series(f"{target}, {name}", svg.cumulative(values)))
    yield svg.plot("Time to the first token", "ms", "share of requests", first, log_x=True)
    hits = [
        (f"{target}, {name}", part["cache_hit_rate"])
        for name, target, part in sides
        if part.get("cache_hit_rate") is not None
    ]
    yield svg.bars("Prompt tokens from the cache", "of all", hits)


def _kernels(runs: Mapping[str, Run]) -> Iterator[str]:
    for name, one in runs.items():
        if samples.command(one) == "kernels":
            yield roofline(name, one)


def roofline(name: str, one: Run) -> str:
    """Our kernels under the device's two ceilings: work per byte against work per second."""
    copy, matmul = one["ceilings"]["copy"], one["ceilings"]["matmul"]
    points = [
        (row["flops"] / row["bytes"], row["flops"] / row["median"] / 1e9)
        for row in one["rows"]
        if row["subject"].startswith("kvjax") and row["flops"] > 0 and row["bytes"] > 0
    ]
    if not points:
        return ""
    low, high = min(x for x, _ in points) / 2, max(max(x for x, _ in points), matmul / copy) * 2
    ceiling = [(x, min(copy * x, matmul) / 1e9) for x in np.geomspace(low, high, 50)]
    return svg.plot(
        f"Kernels under the ceilings ({name})", "flops per byte", "Gflops per second",
        [Series("ceiling: copy, products", ceiling), Series("kvjax", points, line=False)],
        log_x=True,
    )  # fmt: skip


def reuse_plot(results: Any) -> str:
    """What each strategy gains in time to the first token, against what it loses in nats."""
    series = []
    for method in dict.fromkeys(m for corpus in results.corpora for m in results.methods(corpus)):
        points = []
        for corpus in results.corpora:
            mine, full = results.of(corpus, method), results.of(corpus, "full")
            both = [item for item in mine if item in full]
            if both and method != "full":
                speed = np.mean([full[i].prefill_s for i in both])
                speed /= np.mean([mine[i].prefill_s for i in both])
                points.append((max(float(np.mean([mine[i].kl_answer for i in both])), 0.0), speed))
        series.append(Series(method, sorted(points), line=False))
    return svg.plot("Reuse: speed against quality", "loss (nats per token)", "speed-up", series)


def _about(one: Run) -> str:
    """The manifest, folded."""
    manifest = one.get("manifest", {k: one[k] for k in ("commit", "machine") if k in one})
    text = html.escape(json.dumps(manifest, indent=1))
    commit = html.escape(str(manifest.get("commit", "unknown")))
    return f"<details><summary>commit {commit}, manifest</summary><pre>{text}</pre></details>"


def _figures(one: Run) -> str:
    rows: list[Sequence[str]] = [("figure", "unit", "mean", "least", "most", "values")]
    for name, sample in samples.samples(one).items():
        numbers = (np.mean(sample.values), min(sample.values), max(sample.values))
        cells = (f"{value:.5g}" for value in numbers)
        rows.append((name, sample.unit, *cells, str(len(sample.values))))
    for failure in [*one.get("failures", []), *one.get("errors", [])]:
        if isinstance(failure, dict):
            who = failure.get("target", failure.get("subject", failure.get("case", "")))
            rows.append((f"{who} failed: {failure['error']}", "", "", "", "", ""))
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in body]
    return f"<table>{''.join(lines)}</table>"
