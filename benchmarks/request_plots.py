"""Pages about the requests of one serving run: when each was served, and how long they are."""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kvjax.benchmarks import svg
from kvjax.benchmarks.svg import Plot, Series

Run = Mapping[str, Any]
_ROW, _LEFT, _TOP = 8, 60, 40
_WAITS, _FIRST, _REST = "#c9c9c9", svg.COLOURS[4], svg.COLOURS[0]


def timeline(run: Run) -> str:
    """A bar per request over time: waiting for the concurrency cap, until its first token, after.

    Rounds follow each other, as they were run.
    """
    rows = [
        (start - waited, start, start + first, start + whole)
        for start, waited, first, whole in zip(
            run["start_times"], run["queue_times"], run["ttfts"], run["latencies"], strict=True
        )
        if first is not None and whole is not None
    ]
    end = max((stop for *_, stop in rows), default=0.0) or 1.0
    width = svg.WIDTH - _LEFT - 20
    body = [svg.text(svg.WIDTH / 2, 18, "Requests over time", "middle", size=14)]
    for number, times in enumerate(rows):
        at = [_LEFT + width * t / end for t in times]
        for start, stop, colour in zip(at, at[1:], (_WAITS, _FIRST, _REST), strict=False):
            body.append(
                f'<rect x="{start:.1f}" y="{_TOP + _ROW * number}" height="{_ROW - 2}" '
                f'width="{max(stop - start, 0.5):.1f}" fill="{colour}"/>'
            )
    bottom = _TOP + _ROW * len(rows)
    for tick in svg.ticks(0.0, end):
        at_tick = _LEFT + width * tick / end
        body.append(svg.text(at_tick, bottom + 16, f"{tick:g}", "middle"))
    body.append(svg.text(_LEFT + width / 2, bottom + 34, "time (s)", "middle"))
    legend = (("waits at the client", _WAITS), ("to the first token", _FIRST), ("decodes", _REST))
    for number, (name, colour) in enumerate(legend):
        body.append(svg.text(_LEFT + 180 * number, 32, f"■ {name}", colour=colour))
    return _page("Timeline", [svg.wrap(body, bottom + 44)])


def dataset_stats(run: Run) -> str:
    """Histograms of the lengths of prompts and answers."""
    plots = [
        histogram("Prompt lengths", run["input_lens"]),
        histogram("Answer lengths", run["output_lens"]),
    ]
    return _page("Lengths", [svg.draw(one) for one in plots])


def histogram(title: str, lengths: Sequence[int]) -> Plot:
    """Requests by length, as steps over at most twenty ranges."""
    counts, edges = np.histogram(lengths, bins=min(20, max(1, len(set(lengths)))))
    points = [(float(edges[0]), 0.0)]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        points += [(float(low), float(count)), (float(high), float(count))]
    points.append((float(edges[-1]), 0.0))
    return Plot(title, "tokens", "requests", (Series("", points, marks=False),))


def _page(title: str, plots: Sequence[str]) -> str:
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<h1>{html.escape(title)}</h1>{''.join(plots)}</html>\n"
    )


PAGES: dict[str, Callable[[Run], str]] = {"timeline": timeline, "dataset_stats": dataset_stats}
