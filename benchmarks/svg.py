"""Plots as SVG that stands alone: axes, lines, points, bars, a legend beside. No script."""

import dataclasses
import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 800, 380
_RIGHT, _TOP, _BOTTOM = 262, 40, 52  # the legend's column; room for the title; for the x axis
_CHAR, _ROW = 6.3, 17  # pixels of a letter and of a line of the legend
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8d6a9f", "#c98b1b", "#4d4d4d", "#00808a")
_MARKS = ("circle", "square", "triangle", "diamond")


@dataclasses.dataclass(frozen=True, slots=True)
class Series:
    """One line or cloud: a name, and points in the units of the axes."""

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = True
    marks: bool = True
    colour: int | None = None  # of `COLOURS`; None: by its place among the series


@dataclasses.dataclass(frozen=True, slots=True)
class Plot:
    """Series over two axes: from 0 on, or by powers of ten where they are logarithmic."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Bars:
    """Named values as horizontal bars; `most` is the value of a full one (the largest)."""

    title: str
    unit: str
    values: Sequence[tuple[str, float]]
    most: float | None = None


def draw(what: Plot | Bars) -> str:
    """The SVG element; empty where there is nothing to show."""
    return _bars(what) if isinstance(what, Bars) else _plot(what)


def cumulative(values: Sequence[float]) -> list[tuple[float, float]]:
    """Points of the share of values up to each one, as steps."""
    points: list[tuple[float, float]] = []
    ordered = sorted(values)
    for number, value in enumerate(ordered):
        points += [(value, number / len(ordered)), (value, (number + 1) / len(ordered))]
    return points


def ticks(low: float, high: float) -> list[float]:
    """Some six round numbers in between, the first at a multiple of their distance."""
    if high <= low:
        return [high]
    raw = (high - low) / 6
    scale = 10 ** math.floor(math.log10(raw))
    step = next(s * scale for s in (1, 2, 5, 10) if s * scale >= raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * i for i in range(first, last + 1)]


def text(
    x: float, y: float, words: str, anchor: str = "start", colour: str = "#222", size: int = 11
) -> str:
    """A line of text that begins, ends, or has its middle at `x`."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" '
        f'font-size="{size}">{html.escape(words)}</text>'
    )


def wrap(body: Sequence[str], height: float = HEIGHT) -> str:
    """The elements as one SVG on white, `WIDTH` wide."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'width="{WIDTH}" height="{height:.0f}" font-family="DejaVu Sans,Verdana,sans-serif">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(body)}</svg>'
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float
    start: float  # pixels
    stop: float
    log: bool = False

    def at(self, value: float) -> float:
        a, b, v = self.low, self.high, value
        if self.log:
            a, b, v = math.log10(a), math.log10(b), math.log10(v)
        share = (v - a) / (b - a) if b > a else 0.5
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        digits = (1,) if last - first > 3 else (1, 2, 5)
        every = [d * 10.0**p for p in range(first, last + 1) for d in digits]
        return [value for value in every if self.low <= value <= self.high]


def _plot(plot: Plot) -> str:
    series = [s for s in plot.series if s.points]
    points = [p for s in series for p in s.points]
    if not points:
        return ""
    height = max(HEIGHT, _TOP + _ROW * (len(series) + 1))
    xs, ys = zip(*points, strict=True)
    y_axis = _axis(ys, height - _BOTTOM, _TOP, plot.log_y)
    left = 34 + _CHAR * max(len(f"{v:g}") for v in y_axis.ticks())
    x_axis = _axis(xs, left, WIDTH - _RIGHT, plot.log_x)
    body = _frame(plot, x_axis, y_axis)
    named = len(series) > 1 or bool(series[0].name)
    for number, one in enumerate(series):
        colour = COLOURS[(number if one.colour is None else one.colour) % len(COLOURS)]
        mark = _MARKS[number // len(COLOURS) % len(_MARKS)]
        at = [(x_axis.at(x), y_axis.at(y)) for x, y in one.points]
        if one.line and len(at) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
            body.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
            )
        if one.marks:
            body += [_mark(mark, x, y, colour) for x, y in at]
        if named:
            row = _TOP + 8 + _ROW * number
            at_row = WIDTH - _RIGHT + 18
            if one.marks:
                body.append(_mark(mark, at_row, row - 4, colour))
            else:
                body.append(f'<path d="M{at_row - 6} {row - 4}h12" stroke="{colour}"/>')
            room = int((_RIGHT - 32) / _CHAR)
            name = one.name if len(one.name) <= room else one.name[: room - 1] + "…"
            body.append(text(WIDTH - _RIGHT + 28, row, name))
    return wrap(body, height)


def _axis(values: Sequence[float], start: float, stop: float, log: bool) -> _Axis:
    """An axis with some room around the values; they must be positive for a logarithmic one."""
    low, high = min(values), max(values)
    if log and low > 0:
        room = 1.1 if high > low else 2.0
        return _Axis(low / room, high * room, start, stop, True)
    return _Axis(min(0.0, low * 1.05), high * 1.05 if high > 0 else 1.0, start, stop)


def _frame(plot: Plot, x_axis: _Axis, y_axis: _Axis) -> "list[str]":
    left, right, bottom = x_axis.start, x_axis.stop, y_axis.start
    middle = (bottom + _TOP) / 2
    body = [
        text((left + right) / 2, 22, plot.title, "middle", size=14),
        text((left + right) / 2, bottom + 40, plot.x_label, "middle"),
        f'<g transform="rotate(-90 16 {middle:.1f})">'
        f"{text(16, middle, plot.y_label, 'middle')}</g>",
    ]
    for value in y_axis.ticks():
        at = y_axis.at(value)
        body.append(f'<path d="M{left:.1f} {at:.1f}H{right}" stroke="#e2e2e2"/>')
        body.append(text(left - 6, at + 4, f"{value:g}", "end"))
    last = -math.inf
    for value in x_axis.ticks():
        at, half = x_axis.at(value), _CHAR * len(f"{value:g}") / 2
        body.append(f'<path d="M{at:.1f} {bottom:.1f}v5" stroke="#333"/>')
        if at - half > last + 4:  # labels never touch
            body.append(text(at, bottom + 18, f"{value:g}", "middle"))
            last = at + half
    body.append(f'<path d="M{left:.1f} {_TOP}V{bottom:.1f}H{right}" fill="none" stroke="#333"/>')
    return body


def _mark(kind: str, x: float, y: float, colour: str) -> str:
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" fill="{colour}"/>'
    shapes = {
        "square": "m-3.4 -3.4h6.8v6.8h-6.8z",
        "triangle": "m0 -4.4l4.2 7.6h-8.4z",
        "diamond": "m0 -4.8l4.2 4.8l-4.2 4.8l-4.2 -4.8z",
    }
    return f'<path d="M{x:.1f} {y:.1f}{shapes[kind]}" fill="{colour}"/>'


def _bars(bars: Bars) -> str:
    if not bars.values:
        return ""
    most = bars.most or max(value for _, value in bars.values) or 1.0
    height = 22
    left = min(16 + _CHAR * max(len(name) for name, _ in bars.values), WIDTH / 2)
    body = [text(WIDTH / 2, 22, bars.title, "middle", size=14)]
    for row, (name, value) in enumerate(bars.values):
        top = 36 + row * height
        wide = (WIDTH - left - 150) * value / most
        body.append(text(left - 6, top + 15, name, "end"))
        body.append(
            f'<rect x="{left:.1f}" y="{top + 3}" width="{max(wide, 0.5):.1f}" '
            f'height="{height - 6}" fill="{COLOURS[0]}"/>'
        )
        body.append(text(left + wide + 5, top + 15, f"{value:.3g} {bars.unit}".rstrip()))
    return wrap(body, 46 + height * len(bars.values))
