import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from kvjax.benchmarks import report, svg
from kvjax.benchmarks.__main__ import main
from kvjax.benchmarks.reuse_results import Results
from kvjax.benchmarks.svg import Series
from tests.benchmarks.readings import reading

COMMITTED = sorted((Path(report.__file__).parent / "results").glob("*.json"))
SERVED = {
    "command": "serve", "backend": "kvjax", "completed": 2, "output_throughput": 50.0,
    "request_throughput": 2.0, "median_e2el_ms": 300.0, "cache_hit_rate": 0.25, "failures": [
        {"target": "vllm", "error": "no <environment>"}],
    "ttfts": [0.1, 0.2], "itls": [[0.1], [0.2]], "latencies": [0.2, 0.4], "output_lens": [2, 2],
    "peers": {"llamacpp": {"output_throughput": 40.0, "median_e2el_ms": 200.0}},
}  # fmt: skip


def plots(page):
    return [ET.fromstring(s) for s in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def texts(plot):
    return [e.text for e in plot.iter() if e.tag.endswith("text")]


def test_a_page_of_all_committed_results_needs_nothing_from_elsewhere(tmp_path, capsys):
    out = tmp_path / "report.html"
    assert main(["report", *map(str, COMMITTED), "-o", str(out)]) == 0
    page = out.read_text()
    assert re.findall(r"(?:src|href|@import|url\()", page) == []
    assert "http" not in re.sub(r"http://www.w3.org/2000/svg|http-2026\S*|\bhttp\b", "", page)
    assert len(plots(page)) == 2  # two kernel files, two rooflines
    for path in COMMITTED:
        assert f"<h2>{path.name}</h2>" in page
    assert str(out) in capsys.readouterr().out


def test_serving_runs_have_a_frontier_distributions_and_hits():
    page = report.page({"a.json": SERVED})
    frontier, first, hits = plots(page)
    assert {"kvjax", "llamacpp", "Throughput against latency"} <= set(texts(frontier))
    assert "kvjax, a.json" in texts(first)
    assert "0.25 of all" in texts(hits)
    assert "vllm failed: no &lt;environment&gt;" in page
    assert "<td>mean_ttft_ms</td><td>ms</td><td>150</td>" in page


def test_reuse_is_speed_against_quality():
    results = Results({}, {}, {}, {})
    for item in ("x", "y"):
        results.readings["lookup", item, "full"] = reading(prefill_s=0.6)
        results.readings["lookup", item, "epic"] = reading(kl=0.2, prefill_s=0.2)
    (plot,) = plots(report.reuse_plot(results))
    assert "epic" in texts(plot)
    assert "full" not in texts(plot)


def test_a_point_lies_where_its_values_say():
    plot = ET.fromstring(svg.plot("t", "x", "y", [Series("s", [(0, 0), (10, 20)])]))
    circles = [
        (float(e.attrib["cx"]), float(e.attrib["cy"])) for e in plot if e.tag.endswith("circle")
    ]
    assert circles == [(70, 360 - 48), (640 - 20, 34)]


def test_names_are_escaped_and_empty_plots_left_out():
    assert "a&lt;b" in svg.bars("t", "s", [("a<b", 1.0)])
    assert svg.plot("t", "x", "y", [Series("s", [])]) == ""
    assert svg.bars("t", "s", []) == ""
    assert svg.cumulative([3.0, 1.0]) == [(1.0, 0.5), (3.0, 1.0)]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_a_file_that_is_no_result_is_named(tmp_path, capsys, name):
    (tmp_path / name).write_text(json.dumps({"a": 1}) + "\n")
    assert main(["report", str(tmp_path / name), "-o", str(tmp_path / "r.html")]) == 2
    assert name in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()
