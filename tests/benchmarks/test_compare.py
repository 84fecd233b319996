import json

import numpy as np
import pytest

from kvjax.benchmarks import compare, samples
from kvjax.benchmarks.__main__ import main
from kvjax.benchmarks.compare import BETTER, NOISE, REGRESSION, WORSE
from kvjax.benchmarks.results import Results
from kvjax.benchmarks.samples import Sample


def noisy(seed, count=5, scale=1.0, spread=0.03):
    return tuple(scale * np.random.default_rng(seed).lognormal(0, spread, count))


def times(seed, **how):
    return Sample(noisy(seed, **how), "s", False)


def write(path, rows, **manifest):
    out = Results(path, manifest)
    for metric, values in rows.items():
        for value in values:
            out.add("kvjax", "float32", metric, value)
    out.save()
    return str(path)


def test_noise_is_not_reported_as_a_regression():
    alarms = 0
    for seed in range(100):
        pairs = {f"figure {i}": (times((seed, i)), times((seed, i, 1))) for i in range(5)}
        verdicts = compare.compare(pairs, tolerance=0.0)
        alarms += any(v.verdict != NOISE for v in verdicts)
    assert alarms <= 100 * 0.1  # 5 % of the files is what the level promises


def test_a_slowed_down_variant_is_reported_as_a_regression():
    found = [
        compare.compare({"x": (times((s, 0)), times((s, 1), scale=1.25))}, 0.05)[0].verdict
        for s in range(50)
    ]
    assert found.count(REGRESSION) == 50


def test_a_rate_that_falls_is_a_regression_and_one_that_rises_is_better():
    fast, slow = Sample(noisy(0, scale=100), "/s", True), Sample(noisy(1, scale=70), "/s", True)
    verdicts = compare.compare({"falls": (fast, slow), "rises": (slow, fast)}, 0.05)
    assert [v.verdict for v in verdicts] == [REGRESSION, BETTER]


def test_a_change_that_is_real_but_small_is_within_the_tolerance():
    pair = (times(0, count=100), times(1, count=100, scale=1.04))
    assert compare.compare({"x": pair}, 0.1)[0].verdict == WORSE


def test_the_interval_covers_the_true_ratio_as_often_as_it_says():
    hits = 0
    for seed in range(300):
        between = compare.ratio(noisy((seed, 0), 3), noisy((seed, 1), 3, scale=1.5))
        hits += between.low <= 1.5 <= between.high
    assert hits / 300 >= 0.92


def test_a_figure_measured_once_is_judged_by_the_tolerance_alone():
    one, same, slow = (Sample((v,), "s", False) for v in (1.0, 1.04, 1.06))
    verdicts = compare.compare({"same": (one, same), "slow": (one, slow)}, 0.05)
    assert [v.verdict for v in verdicts] == [NOISE, REGRESSION]
    assert np.isnan(verdicts[0].ratio.low)


def test_the_exit_status_says_whether_there_is_a_regression(tmp_path, capsys):
    a = write(tmp_path / "a.json", {"prefill_tps": [100, 101, 99], "total_b8_s": [2.0, 2.01, 1.99]})
    b = write(tmp_path / "b.json", {"prefill_tps": [70, 71, 72], "total_b8_s": [2.0, 2.02, 1.98]})
    assert main(["compare", a, a]) == 0
    assert "within noise" in capsys.readouterr().out
    assert main(["compare", a, b, "--json", str(tmp_path / "c.json")]) == 1
    shown = capsys.readouterr().out
    assert "regressions beyond 5%: kvjax float32 prefill_tps\n" in shown
    rows = json.loads((tmp_path / "c.json").read_text())
    assert [row["verdict"] for row in rows] == [REGRESSION, NOISE]
    assert main(["compare", a, b, "--tolerance", "0.9"]) == 0
    assert main(["compare", b, a]) == 0


def test_different_work_is_refused_unless_asked_for(tmp_path, capsys):
    a = write(tmp_path / "a.json", {"prefill_tps": [100.0]}, sizes={"prompt": 512})
    b = write(tmp_path / "b.json", {"prefill_tps": [100.0]}, sizes={"prompt": 48})
    assert main(["compare", a, b]) == 2
    assert "different work: sizes is {'prompt': 512}" in capsys.readouterr().err
    assert main(["compare", a, b, "--unequal"]) == 0


@pytest.mark.parametrize("text", ["{}", "no json", "[]", '{"command": "cook"}'])
def test_a_file_that_is_no_result_is_named(tmp_path, capsys, text):
    (tmp_path / "x.json").write_text(text)
    assert main(["compare", str(tmp_path / "x.json"), str(tmp_path / "x.json")]) == 2
    assert "x.json is no benchmark result" in capsys.readouterr().err


def test_a_negative_tolerance_is_refused(tmp_path, capsys):
    a = write(tmp_path / "a.json", {"prefill_tps": [100.0]})
    assert main(["compare", a, a, "--tolerance", "-1"]) == 2
    assert "--tolerance must be a number of at least 0, got -1.0" in capsys.readouterr().err


def test_every_committed_result_has_samples():
    folder = compare.Path(compare.__file__).parent / "results"
    for path in folder.glob("*.json"):
        assert samples.samples(samples.read(path)), path.name


def test_requests_are_the_sample_of_a_serving_run_until_there_are_rounds():
    requests = {
        "ttfts": [0.1, 0.2, None], "latencies": [0.5, 0.6, None], "output_lens": [5, 1, 0],
        "itls": [[0.1, 0.1, 0.1, 0.1], [], []],
    }  # fmt: skip
    run = {"command": "serve", **requests, "request_throughput": 2.0, "mean_itl_ms": 100.0}
    found = samples.samples(run)
    assert found["mean_ttft_ms"].values == (100.0, 200.0)
    assert found["mean_tpot_ms"].values == (100.0,)
    assert found["request_throughput"].values == (2.0,)
    rounds = [{"mean_ttft_ms": m, "request_throughput": 2.0} for m in (100.0, 110.0, 120.0)]
    found = samples.samples({**run, "rounds": rounds})
    assert found["mean_ttft_ms"].values == (100.0, 110.0, 120.0)
    assert len(found["request_throughput"].values) == 3
