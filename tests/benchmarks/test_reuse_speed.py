"""The speed of reuse as `reuse-speed` measures it, on few and short documents."""

import json

import pytest

from kvjax.benchmarks.__main__ import main
from tests.benchmarks.result_schema import complaints

SMALL = [
    "--documents", "4", "--document-tokens", "48", "--rounds", "2", "--queries", "6",
    "--methods", "naive", "cacheblend:ratio=0.15",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.model
def test_every_method_runs_what_it_says_and_the_store_keeps_to_its_size(tmp_path):
    out = tmp_path / "speed.json"
    assert main(["reuse-speed", *SMALL, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert complaints(record) == []
    naive, blend = record["long_prompt"].values()
    assert naive["share_run"] < blend["share_run"] < 1
    assert naive["copied_tokens"] == 4 * 48
    assert len(naive["full_s"]) == len(naive["reused_s"]) == 2
    novel = record["novel_queries"]
    assert len(novel["full_s"]) == 6
    assert 0 < novel["pages_at_the_end"] <= novel["capacity_pages"]


def test_a_wrong_strategy_is_refused_before_anything_is_loaded(tmp_path, capsys):
    assert main(["reuse-speed", "--methods", "naiv", "--out", str(tmp_path / "x.json")]) == 2
    assert "no reuse strategy 'naiv'" in capsys.readouterr().err
