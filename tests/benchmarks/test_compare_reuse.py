import numpy as np
import pytest

from kvjax.benchmarks import samples
from kvjax.benchmarks.__main__ import main
from kvjax.benchmarks.compare import NOISE, REGRESSION, compare, paired_ratio
from kvjax.benchmarks.results import append_json
from kvjax.benchmarks.reuse_results import ResultFile
from kvjax.benchmarks.samples import Sample
from tests.benchmarks.readings import reading

SETTINGS = {"split": "held_out", "size": "small", "seed": 0, "about": {"model": "m", "dtype": "f"}}
ITEMS = [f"lookup-{i}" for i in range(12)]


def write(path, scale=1.0, digest="d", solved=True, seed=0):
    rng = np.random.default_rng(seed)
    with ResultFile(path, SETTINGS, {"commit": "abc"}) as file:
        file.note("corpus lookup", digest)
        for loss, item in zip(np.random.default_rng(1).lognormal(-2, 2, 12), ITEMS, strict=True):
            noise = rng.lognormal(0, 0.01, 2)
            file.add(("lookup", item, "full"), reading(prefill_s=0.5 * noise[0]))
            file.add(("lookup", item, "epic"), reading(loss * scale * noise[1], solved=solved))
    return str(path)


def test_a_reuse_result_is_within_noise_of_one_with_other_rounding(tmp_path, capsys):
    a, b = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", seed=7)
    assert main(["compare", a, b]) == 0
    shown = capsys.readouterr().out
    assert "lookup epic KL" in shown
    assert "lookup full first token" in shown
    assert "within noise" in shown


def test_a_loss_that_grew_is_a_regression_although_items_differ_more_than_that(tmp_path, capsys):
    a, b = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", scale=1.3, seed=7)
    assert main(["compare", a, b]) == 1
    assert "regressions beyond 5%: lookup epic KL\n" in capsys.readouterr().out
    assert main(["compare", a, b, "--tolerance", "0.5"]) == 0
    assert main(["compare", b, a]) == 0


def test_answers_that_are_no_longer_right_are_a_regression(tmp_path, capsys):
    a, b = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", solved=False)
    assert main(["compare", a, b]) == 1
    assert "lookup epic solved" in capsys.readouterr().out.splitlines()[-1]


def test_other_corpora_are_other_work(tmp_path, capsys):
    a, b = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", digest="e")
    assert main(["compare", a, b]) == 2
    assert "different work: corpus lookup is d and e" in capsys.readouterr().err


def test_exact_stays_exact_and_what_was_exact_and_is_not_is_a_regression():
    exact = Sample((0.0,) * 4, "nats", False, ("a", "b", "c", "d"), samples.LEAST_KL)
    lossy = Sample((0.1, 0.2, 0.1, 0.2), "nats", False, exact.items, samples.LEAST_KL)
    verdicts = compare({"same": (exact, exact), "lost": (exact, lossy)}, 0.05)
    assert [v.verdict for v in verdicts] == [NOISE, REGRESSION]


def test_pairs_are_of_the_items_that_both_have():
    a = Sample((1.0, 2.0, 9.0), "s", False, ("x", "y", "z"))
    b = Sample((2.0, 4.0), "s", False, ("x", "y"))
    between = paired_ratio(a, b)
    assert between is not None
    assert (between.value, between.low, between.high) == pytest.approx((2.0, 2.0, 2.0))
    assert paired_ratio(a, Sample((1.0,), "s", False, ("w",))) is None


def test_the_newest_of_appended_results_is_compared(tmp_path):
    rows = [{"command": "latency", "latencies": [1.0]}, {"command": "latency", "latencies": [2.0]}]
    path = tmp_path / "many.jsonl"
    for row in rows:
        append_json(path, row)
    assert samples.read_all(path) == rows
    assert samples.read(path) == rows[1]
