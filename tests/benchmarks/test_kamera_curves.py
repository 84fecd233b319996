"""The curves of patches, on one short item: what was made for a prompt heals it, at full refusal
elsewhere."""

import json

import pytest

from kvjax.benchmarks.__main__ import main
from kvjax.benchmarks.kamera_curves import table
from tests.benchmarks.result_schema import complaints

SMALL = ["--items", "1", "--ranks", "4", "200", "--rank", "200", "--moved", "0", "16",
         "--stale", "0", "4", "--orbit", "2"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.model
def test_full_rank_recovers_all_and_what_was_made_elsewhere_is_refused(tmp_path):
    out = tmp_path / "curves.json"
    assert main(["kamera-curves", *SMALL, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert complaints(record) == []
    curves = record["curves"]
    assert curves["rank"]["200"]["recovery"][0] > 0.99
    assert curves["rank"]["4"]["recovery"][0] < curves["rank"]["200"]["recovery"][0]
    assert curves["moved"]["0"]["refused"] == curves["stale"]["0"]["refused"] == 0
    assert curves["moved"]["16"]["refused"] == curves["stale"]["4"]["refused"] == 1
    assert curves["order"]["of its own"]["recovery"][0] > 0.99
    assert "| rank | 200 |" in table(curves)


@pytest.mark.parametrize("wrong", [["--items", "0"], ["--ranks", "0"], ["--stale", "-1"]])
def test_wrong_numbers_are_refused_before_anything_is_loaded(wrong, tmp_path, capsys):
    assert main(["kamera-curves", *wrong, "--out", str(tmp_path / "x.json")]) == 2
    assert "need 1" in capsys.readouterr().err
