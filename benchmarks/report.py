"""`kvjax bench report RESULTS -o report.html`: one page with tables and plots, without a network.

Serving runs give, per workload, the frontier of throughput against latency (a point per file, a
line per target), the distributions of the first token, and the share of prompts that was cached;
kernels their place under the device's ceilings; reuse its speed against its loss; the others their
table.
"""

import argparse
import dataclasses
import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.benchmarks import png, results, reuse_methods, reuse_table, samples, svg
from kvjax.benchmarks.peers import TARGETS
from kvjax.benchmarks.svg import Bars, Plot, Series

Run = Mapping[str, Any]
_COLOURS = {name: number for number, name in enumerate(TARGETS)}  # the same in every plot
_STYLE = (
    "body{font-family:sans-serif;max-width:60em;margin:2em auto;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .7em;border:1px solid #ccc;"
    "text-align:right}td:first-child,th:first-child{text-align:left}pre{overflow:auto}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `kvjax bench report`."""
    parser.add_argument("files", type=Path, nargs="+", help="results (.json; .jsonl of reuse)")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"))
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="also each plot as a picture")


def run(args: argparse.Namespace) -> int:
    """Writes the page and the pictures. Raises `ValueError` for a file that is no result."""
    runs: dict[str, Run] = {}
    reuse: dict[str, Any] = {}
    for path in args.files:
        found = samples.read_all(path)
        for number, one in enumerate(found):
            name = path.name if len(found) == 1 else f"{path.name} {number + 1}"
            if samples.command(one) == "reuse":
                reuse[name] = one["results"]
            else:
                runs[name] = one
    drawn = plots(runs, reuse)
    results.require_writable(args.output)
    args.output.write_text(page(runs, reuse, drawn), encoding="utf-8")
    print(f"report: {args.output}")
    if args.png is not None:
        args.png.mkdir(parents=True, exist_ok=True)
        for name, one in drawn.items():
            file = args.png / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', name)}.png"
            png.write(svg.draw(one), file)
            print(f"picture: {file}")
    return 0


def page(
    runs: Mapping[str, Run], reuse: Mapping[str, Any], drawn: Mapping[str, Plot | Bars]
) -> str:
    """The whole page: everything it needs is in it."""
    parts = [svg.draw(one) for one in drawn.values()]
    for name, found in reuse.items():
        parts.append(f"<h2>{html.escape(name)}</h2>")
        parts.append(f"<pre>{html.escape(reuse_table.markdown(found))}</pre>")
    for name, one in runs.items():
        parts += [f"<h2>{html.escape(name)}</h2>", _about(one), _figures(one)]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>kvjax bench</title>'
        f"<style>{_STYLE}</style><h1>kvjax bench</h1>{''.join(parts)}</html>\n"
    )


def plots(runs: Mapping[str, Run], reuse: Mapping[str, Any]) -> dict[str, Plot | Bars]:
    """Everything that can be drawn, by a name that may be a file's."""
    found: dict[str, Plot | Bars] = {}
    for kind in (_serving, _kernels, _reuse_speed):
        found |= dict(kind(runs))
    for name, readings in reuse.items():
        for corpus in readings.corpora:
            alone = f"reuse-quality-{corpus}"
            key = f"{alone}-{Path(name).stem}" if alone in found else alone
            found[key] = reuse_plot(readings, corpus)
    return {name: one for name, one in found.items() if svg.draw(one)}


def _serving(runs: Mapping[str, Run]) -> Iterator[tuple[str, Plot | Bars]]:
    """Per workload: the frontier, the first tokens, and what came from the cache."""
    sides: dict[str, list[_Side]] = {}
    for one in runs.values():
        if samples.command(one) == "serve" and one.get("completed"):
            about = one.get("manifest", {}).get("workload", {})
            group = sides.setdefault(str(about.get("name", "requests")), [])
            group += [_Side(one, one["backend"], one)]
            group += [_Side(one, peer, part) for peer, part in one.get("peers", {}).items()]
    for workload, group in sides.items():
        points: dict[str, list[tuple[float, float]]] = {}
        for side in group:
            if side.part.get("median_e2el_ms") is not None:
                at = (side.part["median_e2el_ms"] / 1000, side.part["output_throughput"])
                points.setdefault(side.target, []).append(at)
        yield f"frontier-{workload}", Plot(
            f"Throughput against latency: {workload}", "median time of a request (s)",
            "output tokens per second",
            [Series(t, sorted(found), colour=_COLOURS.get(t)) for t, found in points.items()],
        )  # fmt: skip
        first = [
            Series(
                side.name(group),
                svg.cumulative(seconds),
                marks=False,
                colour=_COLOURS.get(side.name(group)),
            )
            for side in group
            if (seconds := [t for t in side.part.get("ttfts", []) if t is not None])
        ]
        yield f"first-token-{workload}", Plot(
            f"Time to the first token: {workload}", "seconds from sending to the first token",
            "share of requests", first, log_x=True,
        )  # fmt: skip
        hits = [
            (side.name(group), 100 * side.part["cache_hit_rate"])
            for side in group
            if side.part.get("cache_hit_rate") is not None
        ]
        yield (
            f"cache-{workload}",
            Bars(f"Prompt tokens from the cache: {workload}", "%", hits, 100.0),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Side:
    """One target of one file."""

    run: Run
    target: str
    part: Run

    def name(self, among: "Sequence[_Side]") -> str:
        """The target's, with its load where several files have it."""
        if sum(other.target == self.target for other in among) == 1:
            return self.target
        cap, rate = self.run.get("max_concurrency"), self.run.get("request_rate", "inf")
        load = f"{cap} at a time" if cap else "all at once" if rate == "inf" else f"{rate}/s"
        return f"{self.target}, {load}"


def _kernels(runs: Mapping[str, Run]) -> Iterator[tuple[str, Plot | Bars]]:
    for name, one in runs.items():
        if samples.command(one) == "kernels":
            yield f"roofline-{Path(name).stem}", roofline(one)


def roofline(one: Run) -> Plot:
    """Our kernels under the device's two ceilings: work per byte against work per second."""
    copy, matmul = one["ceilings"]["copy"], one["ceilings"]["matmul"]
    points: dict[str, list[tuple[float, float]]] = {}
    for row in one["rows"]:
        if row["subject"].startswith("kvjax") and row["flops"] > 0 and row["bytes"] > 0:
            at = (row["flops"] / row["bytes"], row["flops"] / row["median"] / 1e9)
            points.setdefault(row["case"], []).append(at)
    every = [x for found in points.values() for x, _ in found]
    series = []
    if every:
        low, high = min(every) / 2, max(*every, matmul / copy) * 2
        corners = sorted({low, matmul / copy, high})
        ceiling = [(x, min(copy * x, matmul) / 1e9) for x in corners]
        series.append(Series("ceiling: copy, product", ceiling, marks=False))
    series += [Series(case, found, line=False) for case, found in points.items()]
    return Plot(
        f"Kernels under the device's ceilings, {one['dtype']}", "FLOPs per byte",
        "GFLOPs per second", series, log_x=True, log_y=True,
    )  # fmt: skip


def _reuse_speed(runs: Mapping[str, Run]) -> Iterator[tuple[str, Plot | Bars]]:
    for name, one in runs.items():
        if samples.command(one) == "reuse-speed":
            rows = one["long_prompt"].items()
            values = [(reuse_methods.title(spec), row["speed_up"]) for spec, row in rows]
            tokens = one["documents"] * one["document_tokens"]
            yield (
                f"reuse-speed-{Path(name).stem}",
                Bars(
                    f"First token over {tokens:,} stored tokens, against a full prefill",
                    "x",
                    values,
                ),
            )


def reuse_plot(results: Any, corpus: str) -> Plot:
    """How much less each method computes, against what it loses in nats.

    Work, not time: `bench reuse` measures beside anything else, `bench reuse-speed` the time.
    """
    series = []
    for method in results.methods(corpus):
        mine = results.of(corpus, method).values()
        if mine and method != "full":
            run = np.mean([reading.computed_share for reading in mine])
            at = (float(np.mean([reading.kl_answer for reading in mine])), float(1 / run))
            series.append(Series(reuse_methods.title(method), [at], line=False))
    return Plot(
        f"Reuse: work saved against quality, {corpus}", "KL to the full prefill (nats per token)",
        "layer-tokens of a full prefill over those run", series,
    )  # fmt: skip


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
