import itertools
import json
import sys
from pathlib import Path

import pytest

from kvjax.benchmarks import interleave, results
from kvjax.benchmarks.cases import Sizes
from kvjax.benchmarks.interleave import Plan, rotated
from kvjax.benchmarks.results import Results
from kvjax.benchmarks.workers import Target

FAKE = Path(__file__).with_name("fake_target.py")
SIZES = Sizes(prompt=8, new=5, batch=2, prefix=12, tail=4, shared_new=3, start_up_prompt=4)


def fake(name: str, compiles: bool = False, **options) -> Target:
    python = Path(sys.executable)
    return Target(name=name, python=python, file=FAKE, options=options, compiles=compiles)


def plan(cases, rounds=1, timeout_s=20.0) -> Plan:
    ids = list(range(2000))
    return Plan(cases=cases, rounds=rounds, sizes=SIZES, token_ids=ids, timeout_s=timeout_s)


def measure(tmp_path, targets, the_plan, say=lambda text: None) -> dict:
    out = Results(tmp_path / "run.json", {})
    interleave.run({"float32": targets}, the_plan, out, say)
    return results.read(tmp_path / "run.json")


def values(run, target, metric) -> list[float]:
    (row,) = (r for r in run["rows"] if (r["target"], r["metric"]) == (target, metric))
    return row["values"]


def test_every_metric_is_the_known_delays(tmp_path):
    token, step = 0.005, 0.02
    cases = ["prefill", "decode_b1", "decode_b8", "prefix"]
    targets = [fake("a", per_prompt_token=token, per_step=step)]
    run = measure(tmp_path, targets, plan(cases, rounds=2))
    batch = SIZES.batch * SIZES.prompt * token
    expected = {
        "prefill_tps": 1 / token,
        "decode_b1_tps": 1 / step,
        "decode_b8_tps": SIZES.batch / step,
        "total_b8_s": batch + 4 * step,
        "ttft_cold_s": 16 * token,
        "ttft_warm_s": 4 * token,
        "shared_prefix_s": 2 * 4 * token + 2 * step,
    }
    for metric, value in expected.items():
        slack = 0.003 * value / 0.02 if metric.endswith("tps") else 0.003
        assert min(abs(v - value) for v in values(run, "a", metric)) <= max(slack, 0.02 * value)
    assert run["status"] == "complete"
    assert run["errors"] == []
    assert values(run, "a", "peak_rss_mib")[0] > 1


def test_targets_take_turns_with_the_same_prompts_and_never_overlap(tmp_path):
    journals = [tmp_path / "a", tmp_path / "b"]
    targets = [fake(j.name, journal=str(j), per_step=0.002) for j in journals]
    said = []
    run = measure(tmp_path, targets, plan(["decode_b1"], rounds=3), said.append)
    order = [text.split()[1] for text in said if "decode_b1_tps" in text]
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert values(run, "b", "same_tokens") == [SIZES.new] * 3  # its tokens depend on the prompt
    spans = sorted(
        tuple(map(float, line.split())) for j in journals for line in j.read_text().splitlines()
    )
    assert len(spans) == 2 * (3 + 3 * 2)  # three warm-up calls; an untimed and a timed one a round
    assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(spans))


def test_a_first_token_time_that_is_not_reported_is_measured_by_a_second_call(tmp_path):
    target = fake("a", per_prompt_token=0.005, per_step=0.02, first_token=False)
    run = measure(tmp_path, [target], plan(["decode_b1"], rounds=2))
    assert max(values(run, "a", "decode_b1_tps")) == pytest.approx(50, rel=0.25)


def test_unequal_work_becomes_an_error_row_and_no_number(tmp_path):
    run = measure(tmp_path, [fake("short", short_by=1), fake("whole")], plan(["prefill"]))
    assert [(e["target"], e["case"]) for e in run["errors"]] == [("short", "load")]
    assert "new tokens for each" in run["errors"][0]["error"]
    assert {r["target"] for r in run["rows"]} == {"whole"}


def test_a_target_that_dies_keeps_its_numbers_and_the_others_go_on(tmp_path):
    dying = fake("dying", die_after=3 + 2)  # three untimed calls, then one round of prefill
    run = measure(tmp_path, [dying, fake("other")], plan(["prefill"], rounds=3))
    assert len(values(run, "dying", "prefill_tps")) == 1
    assert len(values(run, "other", "prefill_tps")) == 3
    assert [(e["target"], e["round"]) for e in run["errors"]] == [("dying", 1)]


def test_an_error_in_one_case_leaves_the_next_ones_measured(tmp_path):
    broken = fake("broken", fail_on_new=SIZES.new)
    run = measure(tmp_path, [fake("a", per_step=0.01), broken], plan(["decode_b8", "prefill"]))
    assert [(e["target"], e["case"]) for e in run["errors"]] == [("broken", "decode_b8")]
    assert len(values(run, "a", "decode_b8_tps")) == 1
    assert len(values(run, "broken", "prefill_tps")) == 1


def test_an_interruption_keeps_what_was_measured_and_says_so(tmp_path):
    def interrupt(text: str) -> None:
        if "prefill_tps round 2" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, [fake("a")], plan(["prefill"], rounds=3), interrupt)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"] == "interrupted"
    assert len(values(run, "a", "prefill_tps")) == 2
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_said_is_already_on_disk(tmp_path):
    said = []

    def look(text: str) -> None:
        said.append(text)
        run = json.loads((tmp_path / "run.json").read_text())
        assert sum(len(row["values"]) for row in run["rows"]) >= len(said)

    measure(tmp_path, [fake("a")], plan(["prefill"], rounds=3), look)
    assert sum("prefill_tps" in text for text in said) == 3


def test_start_up_counts_from_the_process_and_compiling_targets_start_twice(tmp_path):
    targets = [fake("plain", load=0.2), fake("compiles", compiles=True)]
    run = measure(tmp_path, targets, plan(["start_up"]))
    (plain,) = values(run, "plain", "start_up_s")
    assert 0.2 < plain < 2
    metrics = {r["metric"] for r in run["rows"] if r["target"] == "compiles"}
    assert metrics == {"start_up_s", "start_up_empty_cache_s"}


def test_a_text_too_short_is_refused_before_anything_starts():
    with pytest.raises(ValueError, match="ask for fewer rounds"):
        plan(["prefix"], rounds=1000)


def test_an_unknown_case_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="prefill"):
        plan(["prefil"])


def test_rotation_starts_one_later_each_round():
    assert [rotated("abc", n) for n in (0, 1, 3)] == [list("abc"), list("bca"), list("abc")]
    assert rotated([], 2) == []
