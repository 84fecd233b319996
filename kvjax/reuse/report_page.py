"""A `ReuseReport` drawn: every prompt token coloured by what became of it, layer group by group.

One HTML file without scripts or anything from elsewhere. Whatever comes from outside is escaped.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from html import escape

import numpy as np

from kvjax.reuse.report import Fate, LayerGroup, ReuseReport

MEANING = {
    Fate.EXACT: "found, as a full prefill writes it",
    Fate.SHIFTED: "stored KV, moved to its place",
    Fate.PATCHED: "moved, with a correction added",
    Fate.RECOMPUTED: "stored, but run again",
    Fate.COMPUTED: "run: nothing was stored",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Drawing:
    """What is drawn.

    `tokens` are texts, one per prompt token; `chunks` are spans of them that were marked.
    `deviation` is `[layers, tokens]`: squared distance of KV from a full prefill's, relative to the
    latter's squares; None: it was not measured.
    """

    model: str
    report: ReuseReport
    tokens: tuple[str, ...]
    chunks: tuple[tuple[int, int], ...] = ()
    deviation: np.ndarray | None = None

    def __post_init__(self) -> None:
        expected = (self.report.num_layers, self.report.num_tokens)
        if len(self.tokens) != expected[1]:
            raise ValueError(f"{len(self.tokens)} texts for a prompt of {expected[1]} tokens")
        if self.deviation is not None and self.deviation.shape != expected:
            raise ValueError(f"deviation must be {expected}, got {self.deviation.shape}")

    def deviation_of(self, group: LayerGroup) -> np.ndarray | None:
        """Per token, averaged over the layers of a group."""
        if self.deviation is None:
            return None
        return self.deviation[group.l0 : group.l1].mean(axis=0)

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """What holds for the whole prompt, as names and values."""
        report = self.report
        loss = report.estimated_loss
        rows = [
            ("model", self.model),
            ("strategy", report.strategy),
            ("tokens", f"{report.num_tokens}; marked chunks: {len(self.chunks)}"),
            ("run", f"{report.share_run:.1%} of the layer-tokens of a full prefill"),
            ("copied", f"{report.copied_tokens} tokens"),
            ("loss", "not measured" if loss is None else f"{loss:.4f} nats per token (the gate's)"),
        ]
        if self.deviation is not None:
            rows.append(("KV deviation", f"{self.deviation.mean():.4g} on average"))
        return tuple(rows)


def mean_deviation(drawing: Drawing, group: int, fate: Fate) -> float | None:
    """Of the tokens of a fate in a layer group; None if there are none, or it was not measured."""
    deviation = drawing.deviation_of(drawing.report.groups[group])
    of_fate = drawing.report.fates[group] == fate
    return None if deviation is None or not of_fate.any() else float(deviation[of_fate].mean())


# ---- text ---------------------------------------------------------------------------------------

_EXCERPT = 48  # characters of a run's text


def text_page(drawing: Drawing) -> str:
    """The same in plain text: counts, and runs of tokens of one fate."""
    lines = [f"{name + ':':14}{value}" for name, value in drawing.facts]
    for number, group in enumerate(drawing.report.groups):
        lines += ["", f"layers {group.l0} to {group.l1 - 1}"]
        for fate in Fate:
            count = getattr(group, fate.name.lower())
            mean = mean_deviation(drawing, number, fate)
            measured = "" if mean is None else f"   KV deviation {mean:.4g}"
            if count:
                lines.append(f"  {fate.name.lower():11}{count:7}   {MEANING[fate]}{measured}")
        for start, stop, fate in _runs(drawing.report.fates[number]):
            excerpt = "".join(drawing.tokens[start:stop])
            if len(excerpt) > _EXCERPT:
                excerpt = excerpt[: _EXCERPT // 2] + "..." + excerpt[-_EXCERPT // 2 :]
            printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in excerpt)
            lines.append(f"  [{start}, {stop})".ljust(16) + f"{fate.name.lower():11} {printable}")
    return "\n".join(lines) + "\n"


def _runs(fates: np.ndarray) -> Iterator[tuple[int, int, Fate]]:
    edges = [0, *(np.flatnonzero(np.diff(fates)) + 1).tolist(), len(fates)]
    for start, stop in itertools.pairwise(edges):
        yield start, stop, Fate(int(fates[start]))


# ---- HTML ---------------------------------------------------------------------------------------

_STYLE = """
  :root { color-scheme: light dark; --ink: #1b2230; --soft: #667085; --line: #dde2ea; --bg: #fbfcfd;
    --exact: #bfe3cd; --shifted: #c3dcf7; --patched: #dccbf3; --recomputed: #fbd08f;
    --computed: #e3e6eb; --edge: #8a94a6; --off: 186 28 60; }
  @media (prefers-color-scheme: dark) { :root { --ink: #e6eaf2; --soft: #98a3b8; --line: #343d4d;
    --bg: #161a22; --exact: #1f5a3a; --shifted: #234b78; --patched: #54397e; --recomputed: #80520f;
    --computed: #333b49; --off: 255 110 130; } }
  body { margin: 0 auto; max-width: 1060px; padding: 28px 22px 60px; background: var(--bg);
    color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
  h1 { font-size: 21px; margin: 0 0 4px; } h1 + p { margin: 0 0 18px; color: var(--soft); }
  h2 { font-size: 16px; margin: 34px 0 8px; }
  h2 small { font-weight: 400; color: var(--soft); }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 0; }
  dt { color: var(--soft); } dd { margin: 0; }
  table { border-collapse: collapse; margin: 6px 0; font-variant-numeric: tabular-nums; }
  th, td { padding: 4px 18px 4px 0; text-align: right; border-bottom: 1px solid var(--line); }
  th:first-child, td:first-child, .key td { text-align: left; }
  th { color: var(--soft); font-weight: 500; }
  td:first-child { white-space: nowrap; }
  .swatch { display: inline-block; width: 13px; height: 13px; border-radius: 3px;
    margin-right: 8px; vertical-align: -1px; }
  .bar { display: flex; height: 9px; border-radius: 4px; overflow: hidden; margin: 8px 0 12px; }
  .prompt { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.95;
    font: 13.5px/1.95 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
  .prompt i, .prompt b { font-style: normal; font-weight: 400; border-radius: 2px; padding: 2px 0; }
  .prompt i { outline: 1px solid var(--bg); outline-offset: -1px; }
  .chunk { border-left: 2px solid var(--edge); border-right: 2px solid var(--edge);
    padding: 2px 1px; margin: 0 1px; border-radius: 4px; }
  .nl { color: var(--soft); }
""" + "".join(
    f"  .{fate.name.lower()} {{ background: var(--{fate.name.lower()}); }}\n" for fate in Fate
)


def html_page(drawing: Drawing) -> str:
    """The whole page."""
    groups = drawing.report.groups
    facts = "".join(f"<dt>{escape(n)}<dd>{escape(v)}\n" for n, v in drawing.facts)
    sections = "".join(_section(drawing, number) for number in range(len(groups)))
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Reuse of KV: {escape(drawing.report.strategy)}</title>
<style>{_STYLE}</style>
<h1>What became of every prompt token</h1>
<p>Reuse of stored KV, one request</p>
<dl>
{facts}</dl>
<h2>Legend</h2>
{_legend(drawing)}
<h2>Tokens by layers</h2>
{_counts(drawing)}
{sections}</html>
"""


def _legend(drawing: Drawing) -> str:
    rows = "".join(
        f'<tr><td><span class="swatch {fate.name.lower()}"></span>{fate.name.lower()}'
        f"<td>{MEANING[fate]}\n"
        for fate in Fate
    )
    notes = '<tr><td><span class="chunk">text</span><td>a marked chunk\n'
    if drawing.deviation is not None:
        notes += (
            '<tr><td><b style="box-shadow:inset 0 -4px rgb(var(--off)/1)">text</b><td>the stronger '
            "the line, the further the KV is from a full prefill's: invisible at 0.0001, full at "
            "1 (squared distance over squares); point at a token for its number\n"
        )
    return f'<table class="key">{rows}{notes}</table>'


def _counts(drawing: Drawing) -> str:
    measured = drawing.deviation is not None
    head = "".join(f"<th>{fate.name.lower()}" for fate in Fate)
    rows = []
    for number, group in enumerate(drawing.report.groups):
        cells = "".join(f"<td>{getattr(group, fate.name.lower())}" for fate in Fate)
        rows.append(f"<tr><td>{_name(group)}{cells}\n")
        if measured:
            means = [mean_deviation(drawing, number, fate) for fate in Fate]
            cells = "".join(f"<td>{'' if mean is None else f'{mean:.3g}'}" for mean in means)
            rows.append(f"<tr><td>&emsp;mean KV deviation{cells}\n")
    return f"<table><tr><th>layers{head}\n{''.join(rows)}</table>"


def _section(drawing: Drawing, number: int) -> str:
    group, report = drawing.report.groups[number], drawing.report
    bar = "".join(
        f'<span class="{fate.name.lower()}" style="flex:{count}"></span>'
        for fate in Fate
        if (count := getattr(group, fate.name.lower()))
    )
    deviation = drawing.deviation_of(group)
    starts, stops = ({at for at, _ in drawing.chunks}, {at for _, at in drawing.chunks})
    parts = []
    for at, text in enumerate(drawing.tokens):
        if at in starts:
            parts.append('<span class="chunk">')
        fate = Fate(int(report.fates[number, at])).name.lower()
        off = None if deviation is None else float(deviation[at])
        parts.append(_token(at, text, fate, off))
        if at + 1 in stops:
            parts.append("</span>")
    return (
        f"<h2>{_name(group).capitalize()} <small>{group.l1 - group.l0} of {report.num_layers}"
        f'</small></h2>\n<div class="bar">{bar}</div>\n'
        f'<div class="prompt">{"".join(parts)}</div>\n'
    )


def _token(at: int, text: str, fate: str, deviation: float | None) -> str:
    title, style = f"token {at}: {fate}", ""
    if deviation is not None:
        title += f", KV deviation {deviation:.3g}"
        strength = _strength(deviation)
        if strength > 0:
            style = f' style="box-shadow:inset 0 -4px rgb(var(--off)/{strength:.2f})"'
    shown = escape(text).replace("\n", '<span class="nl">&crarr;</span>\n')
    return f'<i class="{fate}" title="{title}"{style}>{shown}</i>'


def _strength(deviation: float) -> float:
    """How strong its line is: logarithmic, 0 at 1e-4, 1 at 1."""
    return float(np.clip(1 + np.log10(max(deviation, 1e-12)) / 4, 0, 1))


def _name(group: LayerGroup) -> str:
    last = group.l1 - 1
    return f"layer {last}" if group.l0 == last else f"layers {group.l0} to {last}"
