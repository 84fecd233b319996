"""Plots as inline SVG: axes, points with intervals, lines, bars. No library, no script."""

import dataclasses
import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 34, 48
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8d6a9f", "#c98b1b", "#4d4d4d", "#00808a")


@dataclasses.dataclass(frozen=True, slots=True)
class Series:
    """One line or cloud: a name, and points in the units of the axes."""

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = True


def plot(
    title: str, x_label: str, y_label: str, series: Sequence[Series], *, log_x: bool = False
) -> str:
    """Series over two axes from 0 on; `log_x` shows powers of ten instead. Empty for no points."""
    series = [s for s in series if s.points]
    points = [p for s in series for p in s.points]
    if not points:
        return ""
    low = min(x for x, _ in points) if log_x else 0.0
    x_axis = _Axis(low, max(x for x, _ in points), _LEFT, WIDTH - _RIGHT, log_x and low > 0)
    y_axis = _Axis(0.0, max(y for _, y in points), HEIGHT - _BOTTOM, _TOP)
    body = _frame(title, x_label, y_label, x_axis, y_axis)
    for number, one in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        at = [(x_axis.at(x), y_axis.at(y)) for x, y in one.points]
        if one.line and len(at) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
            body.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        if len(at) <= 60:
            body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in at]
        body.append(_text(WIDTH - _RIGHT - 6, _TOP + 14 + 15 * number, one.name, "end", colour))
    return _svg(body)


def bars(title: str, unit: str, values: Sequence[tuple[str, float]]) -> str:
    """Named values as horizontal bars; empty for none."""
    if not values:
        return ""
    most = max(value for _, value in values) or 1.0
    height, left = 22, 250
    body = [_text(WIDTH / 2, 18, title, "middle", size=14)]
    for row, (name, value) in enumerate(values):
        top = 30 + row * height
        wide = (WIDTH - left - 90) * value / most
        colour = COLOURS[row % len(COLOURS)]
        body.append(_text(left - 6, top + 14, name, "end"))
        body.append(
            f'<rect x="{left}" y="{top + 3}" width="{max(wide, 0):.1f}" height="{height - 6}" '
            f'fill="{colour}"/>'
        )
        body.append(_text(left + wide + 5, top + 14, f"{value:.4g} {unit}"))
    return _svg(body, 40 + height * len(values))


def cumulative(values: Sequence[float]) -> list[tuple[float, float]]:
    """Points of the share of values up to each one."""
    ordered = sorted(values)
    return [(value, (i + 1) / len(ordered)) for i, value in enumerate(ordered)]


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
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            return [10.0**p for p in range(first, last + 1) if self.low <= 10.0**p <= self.high]
        if self.high <= self.low:
            return [self.high]
        raw = (self.high - self.low) / 5
        scale = 10 ** math.floor(math.log10(raw))
        step = next(s * scale for s in (1, 2, 5, 10) if s * scale >= raw)
        return [step * i for i in range(math.floor(self.high / step) + 1)]


def _frame(title: str, x_label: str, y_label: str, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    y_title = _text(16, HEIGHT / 2, y_label, "middle")
    body = [
        _text(WIDTH / 2, 20, title, "middle", size=14),
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#333"/>',
        _text((WIDTH + _LEFT) / 2, HEIGHT - 10, x_label, "middle"),
        f'<g transform="rotate(-90 16 {HEIGHT / 2})">{y_title}</g>',
    ]
    for value in x_axis.ticks():
        at = x_axis.at(value)
        body.append(f'<path d="M{at:.1f} {bottom}v5" stroke="#333"/>')
        body.append(_text(at, bottom + 18, f"{value:g}", "middle"))
    for value in y_axis.ticks():
        at = y_axis.at(value)
        body.append(f'<path d="M{_LEFT} {at:.1f}H{right}" stroke="#ddd"/>')
        body.append(_text(_LEFT - 6, at + 4, f"{value:g}", "end"))
    return body


def _text(
    x: float, y: float, text: str, anchor: str = "start", colour: str = "#222", size: int = 11
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" '
        f'font-size="{size}">{html.escape(text)}</text>'
    )


def _svg(body: Sequence[str], height: float = HEIGHT) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'width="{WIDTH}" font-family="sans-serif">{"".join(body)}</svg>'
    )
