"""The curves of patches, on one short item: what was made for a prompt heals it, at full refusal
elsewhere."""

import argparse
import json

import pytest

from kvjax import LLM
from kvjax.benchmarks.__main__ import main
from kvjax.benchmarks.corpora import Corpus, Item, Passage
from kvjax.benchmarks.kamera_curves import Bench, summary, table
from tests.benchmarks.result_schema import complaints
from tests.tiny_model import tiny

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
    assert curves["moved"]["16"]["refused"] == 1
    assert 0 < curves["stale"]["4"]["refused"] < 1  # those behind the edit; what replaced is fresh
    assert curves["order"]["of its own"]["recovery"][0] > 0.99
    assert "| rank | 200 |" in table(curves)


def item(name: str, *texts: str) -> Item:
    passages = tuple(Passage(f"{name}{n}", text) for n, text in enumerate(texts))
    return Item(
        id=name, corpus="t", template="t", system="x", passages=passages, question="q?", answers=(),
    )  # fmt: skip


@pytest.mark.slow
def test_patches_of_full_rank_are_exact_where_they_were_made_for_and_refused_elsewhere():
    mine = item("a", "the keeper", "is Farid; ", "his code ", "is 4817. ")
    other = item("b", "prices are", " in crowns")
    numbers = argparse.Namespace(ranks=[2, 10], rank=10, moved=[0, 5], stale=[0, 2], orbit=2)
    llm = tiny(LLM, fresh=True, num_pages=96, max_model_len=256)
    bench = Bench(numbers, Corpus("t", (mine, other), ()), llm)
    readings: dict = {}
    for (curve, at), reading in bench.read(mine):
        readings.setdefault(curve, {}).setdefault(str(at), []).append(reading)
    curves = summary(readings)
    for curve, at in (("rank", "10"), ("moved", "0"), ("stale", "0"), ("order", "of its own")):
        assert curves[curve][at]["kl_patched"] < 1e-6
        assert curves[curve][at]["recovery"][0] > 0.99
    assert curves["rank"]["2"]["kl_patched"] > 1e-6
    assert curves["moved"]["5"]["refused"] == 1
    stale = curves["stale"]["2"]
    assert stale["refused"] == pytest.approx(18 / 38)  # the last two of 10, 10, 9 and 9 tokens
    assert stale["kl_fresh"] < 1e-6 < min(stale["kl_refusing"], stale["kl_patched"])
    assert len(stale["over_refusing"]) == 3
    low = stale["recovery"][1]
    assert f"| stale | 2 | {low:.3f} to" in table(curves)


@pytest.mark.parametrize("wrong", [["--items", "0"], ["--ranks", "0"], ["--stale", "-1"]])
def test_wrong_numbers_are_refused_before_anything_is_loaded(wrong, tmp_path, capsys):
    assert main(["kamera-curves", *wrong, "--out", str(tmp_path / "x.json")]) == 2
    assert "need 1" in capsys.readouterr().err
