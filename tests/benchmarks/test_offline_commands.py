import json

import pytest

from kvjax.benchmarks import latency, startup, throughput
from kvjax.benchmarks.__main__ import main
from tests.benchmarks.result_schema import complaints
from tests.tiny_checkpoint import write_tiny_checkpoint

ENGINE = ["--dtype=float32", "--max-num-seqs=2", "--max-num-batched-tokens=16",
          "--max-model-len=64"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


def run(tmp_path, *words):
    out = tmp_path / "r.json"
    assert main([*words, *ENGINE, f"--output-json={out}"]) == 0
    record = json.loads(out.read_text())
    assert complaints(record) == []
    assert record["status"] == "complete"
    assert record["peak_rss_mib"] > 50
    assert record["programs"] > 0
    return record


@pytest.mark.slow  # this and the next two compile whole engines
def test_latency_is_measured_and_compares_with_itself(tmp_path, model, capsys):
    words = ["--input-len=8", "--output-len=4", "--batch-size=2", "--num-iters=3",
             "--num-iters-warmup=1"]  # fmt: skip
    record = run(tmp_path, "latency", f"--model={model}", *words)
    assert len(record["latencies"]) == 3
    assert record["compiles"] == 0
    assert record["cache_hit_rate"] == 0
    assert 0 < record["share_of_compute"] < 1
    assert record["manifest"]["engine"]["cache"]["enable_prefix_caching"] is False
    assert "Avg latency:" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "r.json"), str(tmp_path / "r.json")]) == 0


@pytest.mark.slow
def test_throughput_is_measured_by_rounds(tmp_path, model, capsys):
    words = ["--dataset-name=shared-prefix", "--num-prompts=4", "--prefix-len=16",
             "--num-prefixes=1", "--input-len=8", "--output-len=4", "--vocab-size=256"]  # fmt: skip
    record = run(tmp_path, "throughput", f"--model={model}", *words, "--rounds=2")
    assert record["total_num_tokens"] == 2 * 4 * (16 + 8 + 4)
    assert len(record["rounds"]) == 2
    assert record["steps"] > 0
    assert 0 < record["share_of_bandwidth"] < 1
    assert 0 < record["num_cached_tokens"] < 2 * 4 * 24
    assert "total tokens/s" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "r.json"), str(tmp_path / "r.json")]) == 0
    same = run(tmp_path, "throughput", f"--model={model}", *words, "--rounds=1", "--async-engine")
    assert same["total_num_tokens"] == 4 * (16 + 8 + 4)


@pytest.mark.slow
def test_a_warm_start_is_measured_after_one_that_fills_the_cache(tmp_path, model):
    words = ["--num-iters-warmup=1", "--num-iters-cold=0", "--num-iters-warm=1"]
    record = run(tmp_path, "startup", f"--model={model}", *words)
    assert record["cold_startup_times"] == []
    assert 0 < record["warm_compilation_times"][0] < record["warm_first_token_times"][0]
    assert record["warm_startup_times"][0] < record["warm_first_token_times"][0]


def test_the_summary_of_a_hand_computed_example():
    found = latency.summary([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found["avg_latency"], found["std_latency"]) == (3.0, pytest.approx(2**0.5))
    assert found["percentiles"]["50"] == 3.0
    assert found["percentiles"]["90"] == pytest.approx(4.6)


def test_rates_of_rounds_together_are_over_all_their_seconds():
    counts = {"num_prompt_tokens": 90, "num_output_tokens": 10, "num_cached_tokens": 45}
    rounds = [throughput.rates(1.0, 5, counts), throughput.rates(3.0, 5, counts)]
    found = throughput.together(rounds)
    assert found["elapsed_time"] == 4.0
    assert found["requests_per_second"] == 2.5
    assert found["tokens_per_second"] == 50.0
    assert found["output_tokens_per_second"] == 5.0
    assert found["cache_hit_rate"] == 0.5


def test_the_summary_of_starts_is_by_kind_and_part():
    found = startup.summary({"cold_startup_times": [1.0, 3.0], "warm_startup_times": [], "x": 1})
    assert found == {"avg_cold_startup_time": 2.0, "std_cold_startup_time": 1.0}


@pytest.mark.parametrize(("words", "said"), [
    (["latency", "--num-iters=0"], "sizes must be at least 1"),
    (["throughput", "--rounds=0"], "--rounds and --n must be at least 1"),
    (["throughput", "--dataset-name=multi-turn"], "quotes answers, which needs kvjax bench serve"),
    (["throughput", "--engine-option=x=1"], "unknown setting 'x'"),
    (["startup", "--num-iters-cold=-1"], "must not be negative"),
    (["latency", "--model=/nowhere/at/all"], "/nowhere/at/all"),
    (["latency", "--engine-option=seed"], "--engine-option wants NAME=JSON, got 'seed'"),
])  # fmt: skip
def test_what_cannot_be_measured_is_said(tmp_path, capsys, words, said):
    assert main([*words, f"--output-json={tmp_path}/r.json"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(("command", "option"), [
    ("latency", "--output-json"), ("throughput", "--output-json"), ("startup", "--output-json"),
    ("kernels", "--out"), ("overhead", "--out"), ("http", "--out"), ("reuse-speed", "--out"),
    ("reuse", "--output"), ("engine", "--out"), ("report", "--output"),
])  # fmt: skip
def test_an_unwritable_folder_is_said_first(tmp_path, capsys, command, option):
    (tmp_path / "file").touch()
    words = [command, f"{option}={tmp_path}/file/r.json"]
    if command == "report":
        (tmp_path / "a.json").write_text('{"command": "latency", "latencies": [1.0]}')
        words.append(f"{tmp_path}/a.json")
    assert main(words) == 2
    assert "cannot write results to" in capsys.readouterr().err
