"""Plots of the report as PNG files, for pages that show no SVG. Needs the `bench` extra."""

import importlib
from pathlib import Path

from kvjax.benchmarks import svg

_ZOOM = 2.0


def write(drawing: str, path: Path) -> None:
    """Renders an SVG at twice its size.

    Raises `ValueError` if the renderer is not installed, or finds no font for the labels.
    """
    try:
        resvg_py = importlib.import_module("resvg_py")
    except ImportError:
        raise ValueError("PNG files need resvg-py: pip install 'kvjax[bench]'") from None

    def render(one: str) -> bytes:
        return bytes(resvg_py.svg_to_bytes(svg_string=one, zoom=_ZOOM))

    if render(svg.wrap([svg.text(9, 9, "x")], 20)) == render(svg.wrap([], 20)):
        raise ValueError("PNG files need a font: install one, such as DejaVu Sans")
    path.write_bytes(render(drawing))
