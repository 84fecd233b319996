import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from kvjax.benchmarks import report, svg
from kvjax.benchmarks.__main__ import main
from kvjax.benchmarks.reuse_results import Results
from kvjax.benchmarks.svg import Bars, Plot, Series
from tests.benchmarks.readings import reading

COMMITTED = sorted(
    p for p in (Path(report.__file__).parent / "results").iterdir() if ".json" in p.suffix
)
SERVED = {
    "command": "serve", "backend": "kvjax", "completed": 2, "output_throughput": 50.0,
    "manifest": {"workload": {"name": "rag"}},
    "request_throughput": 2.0, "median_e2el_ms": 300.0, "cache_hit_rate": 0.25, "failures": [
        {"target": "vllm", "error": "no <environment>"}],
    "ttfts": [0.1, 0.2], "itls": [[0.1], [0.2]], "latencies": [0.2, 0.4], "output_lens": [2, 2],
    "peers": {"llamacpp": {"output_throughput": 40.0, "median_e2el_ms": 200.0}},
}  # fmt: skip


def plots(page):
    return [ET.fromstring(s) for s in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def texts(plot):
    return [e.text for e in plot.iter() if e.tag.endswith("text")]


def drawn(one):
    return ET.fromstring(svg.draw(one))


def boxes(plot):
    """Places of all unrotated words: left, right, baseline."""
    turned = {id(e) for g in plot.iter() if g.get("transform") for e in g.iter()}
    for e in plot.iter():
        if e.tag.endswith("text") and id(e) not in turned:
            wide = len(e.text) * 0.57 * float(e.attrib["font-size"])
            shift = {"start": 0, "middle": wide / 2, "end": wide}[e.attrib["text-anchor"]]
            left = float(e.attrib["x"]) - shift
            yield left, left + wide, float(e.attrib["y"])


def test_a_page_of_all_committed_results_needs_nothing_from_elsewhere(tmp_path, capsys):
    out = tmp_path / "report.html"
    assert main(["report", *map(str, COMMITTED), "-o", str(out)]) == 0
    page = out.read_text()
    assert re.findall(r"(?:src|href|@import|url\()", page) == []
    assert "http" not in re.sub(r"http://www.w3.org/2000/svg|http-2026\S*|\bhttp\b", "", page)
    shown = [texts(one)[0] for one in plots(page)]
    for wanted in ("under the device's ceilings, bfloat16",
                   "Reuse: work saved against quality, lookup",
                   "First token over 4,000 stored tokens"):  # fmt: skip
        assert any(wanted in str(title) for title in shown), wanted
    for path in COMMITTED:
        assert f"<h2>{path.name}</h2>" in page
    assert str(out) in capsys.readouterr().out


def test_serving_runs_have_a_frontier_distributions_and_hits():
    found = report.plots({"a.json": SERVED}, {})
    page = report.page({"a.json": SERVED}, {}, found)
    frontier, first, hits = plots(page)
    assert list(found) == ["frontier-rag", "first-token-rag", "cache-rag"]
    assert {"kvjax", "llamacpp", "Throughput against latency: rag"} <= set(texts(frontier))
    assert "median time of a request (s)" in texts(frontier)
    assert "Time to the first token: rag" in texts(first)
    assert "25 %" in texts(hits)
    assert "vllm failed: no &lt;environment&gt;" in page
    assert "<td>mean_ttft_ms</td><td>ms</td><td>150</td>" in page


def test_reuse_is_work_saved_against_quality():
    results = Results({}, {}, {}, {})
    for item in ("x", "y"):
        results.readings["lookup", item, "full"] = reading()
        results.readings["lookup", item, "epic"] = reading(kl=0.2, computed_layer_tokens=100)
    plot = report.reuse_plot(results, "lookup")
    (series,) = plot.series
    ((loss, saved),) = series.points
    assert (series.name, loss, saved) == ("epic", pytest.approx(0.2), pytest.approx(3.0))
    assert "nats" in plot.x_label


def test_a_load_tells_two_runs_of_one_target_apart():
    runs = {"a": {**SERVED, "max_concurrency": 4}, "b": {**SERVED, "request_rate": 2.0}}
    found = report.plots(runs, {})
    first, frontier = found["first-token-rag"], found["frontier-rag"]
    assert isinstance(first, Plot)
    assert isinstance(frontier, Plot)
    names = [s.name for s in first.series]
    assert names == ["kvjax, 4 at a time", "kvjax, 2.0/s"]
    assert len(frontier.series[0].points) == 2


def test_no_words_of_any_plot_of_the_committed_results_overlap():
    runs = {p.name: report.samples.read(p) for p in COMMITTED}
    reuse = {n: r["results"] for n, r in runs.items() if report.samples.command(r) == "reuse"}
    found = report.plots({n: r for n, r in runs.items() if n not in reuse}, reuse)
    assert found
    for name, one in found.items():
        plot = drawn(one)
        placed = list(boxes(plot))
        assert min(left for left, _, _ in placed) >= 0, name
        assert max(right for _, right, _ in placed) <= svg.WIDTH, name
        for number, (left, right, y) in enumerate(placed):
            for other_left, other_right, other_y in placed[:number]:
                apart = right <= other_left or other_right <= left or abs(y - other_y) >= 11
                assert apart, (name, left, y)


def test_a_point_lies_where_its_values_say():
    plot = drawn(Plot("t", "x", "y", [Series("", [(0, 0), (10, 20)])]))
    lines = [e.attrib["d"] for e in plot if e.get("stroke") == "#333"]
    (frame,) = [line for line in lines if "H" in line]
    left, top, bottom, right = map(float, re.findall(r"[\d.]+", frame))
    circles = [
        (float(e.attrib["cx"]), float(e.attrib["cy"])) for e in plot if e.tag.endswith("circle")
    ]
    (x0, y0), (x1, y1) = circles
    assert (x0, y0) == (left, bottom)  # both axes begin at 0 and end 5 % behind the last value
    assert (x1, y1) == (
        pytest.approx(left + (right - left) / 1.05, abs=0.1),
        pytest.approx(bottom - (bottom - top) / 1.05, abs=0.1),
    )


def test_names_are_escaped_and_empty_plots_left_out():
    assert "a&lt;b" in svg.draw(Bars("t", "s", [("a<b", 1.0)]))
    assert svg.draw(Plot("t", "x", "y", [Series("s", [])])) == ""
    assert svg.draw(Bars("t", "s", [])) == ""
    assert svg.cumulative([3.0, 1.0]) == [(1.0, 0.0), (1.0, 0.5), (3.0, 0.5), (3.0, 1.0)]


def test_pictures_are_pngs_of_twice_the_size(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(SERVED))
    words = ["report", str(tmp_path / "a.json"), "-o", str(tmp_path / "r.html")]
    assert main([*words, "--png", str(tmp_path / "png")]) == 0
    pictures = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert pictures == ["cache-rag.png", "first-token-rag.png", "frontier-rag.png"]
    head = (tmp_path / "png" / "frontier-rag.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(head[16:20], "big") == 2 * svg.WIDTH


def test_without_a_renderer_the_page_is_written_and_the_extra_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    (tmp_path / "a.json").write_text(json.dumps(SERVED))
    words = ["report", str(tmp_path / "a.json"), "-o", str(tmp_path / "r.html")]
    assert main([*words, "--png", str(tmp_path)]) == 2
    assert "pip install 'kvjax[bench]'" in capsys.readouterr().err
    assert (tmp_path / "r.html").exists()


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_a_browser_shows_the_page(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(SERVED))
    page, shot = tmp_path / "r.html", tmp_path / "shot.png"
    assert main(["report", str(tmp_path / "a.json"), "-o", str(page)]) == 0
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,1400",
             f"--user-data-dir={tmp_path}/u", f"--screenshot={shot}", page.as_uri()]  # fmt: skip
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    assert shot.stat().st_size > 20_000  # an empty page has 6,000


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_a_file_that_is_no_result_is_named(tmp_path, capsys, name):
    (tmp_path / name).write_text(json.dumps({"a": 1}) + "\n")
    assert main(["report", str(tmp_path / name), "-o", str(tmp_path / "r.html")]) == 2
    assert name in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()
