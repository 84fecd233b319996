import pytest

from kvjax.benchmarks.client import Record
from kvjax.benchmarks.figures import busiest_second, details, figures, most_at_once, show


def record(sent, ttft, gaps, **more):
    e2el = ttft + sum(gaps)
    return Record(sent=sent, ttft=ttft, itl=list(gaps), e2el=e2el, input_len=10,
                  output_len=len(gaps) + 1, **more)  # fmt: skip


# Three requests, worked out by hand: TTFT 100, 200, 300; E2EL 300, 800, 300; TPOT 100, 200, none.
RECORDS = [
    record(0.0, 0.1, [0.1, 0.1], cached=4),
    record(0.2, 0.2, [0.2, 0.1, 0.3], cached=0),
    record(1.5, 0.3, [], cached=8),
]
FAILED = Record(error="no")


def test_a_hand_computed_example():
    found = figures([*RECORDS, FAILED], 2.0, percentiles=(50, 90))
    assert (found["completed"], found["failed"]) == (3, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 8)
    assert found["request_throughput"] == 1.5
    assert found["output_throughput"] == 4.0
    assert found["total_token_throughput"] == 19.0
    assert found["mean_ttft_ms"] == pytest.approx(200)
    assert found["std_ttft_ms"] == pytest.approx((20000 / 3) ** 0.5)
    assert found["p50_ttft_ms"] == pytest.approx(200)
    assert found["p90_ttft_ms"] == pytest.approx(280)  # 200 + 0.8 * 100
    assert found["mean_tpot_ms"] == pytest.approx(150)
    assert found["median_itl_ms"] == pytest.approx(100)
    assert found["mean_itl_ms"] == pytest.approx(160)
    assert found["mean_e2el_ms"] == pytest.approx((300 + 800 + 300) / 3)
    assert found["total_cached_tokens"] == 12
    assert found["cache_hit_rate"] == pytest.approx(0.4)


@pytest.mark.parametrize(("slo", "good"), [
    ({"ttft": 250}, 2), ({"ttft": 250, "e2el": 500}, 1), ({"tpot": 150}, 2), ({"e2el": 1}, 0),
    ({"itl": 250}, 2),
])  # fmt: skip
def test_goodput_counts_requests_that_meet_every_objective(slo, good):
    assert figures(RECORDS, 2.0, goodput=slo)["request_goodput"] == good / 2


def test_goodput_is_unknown_without_objectives():
    assert figures(RECORDS, 2.0)["request_goodput"] is None


def test_requests_at_once_are_counted_by_their_times():
    assert most_at_once(RECORDS) == 2
    touching = [record(0.0, 1.0, []), record(1.0, 1.0, [])]
    assert most_at_once(touching) == 1


def test_the_busiest_second_counts_streamed_outputs():
    assert busiest_second(RECORDS) == 6.0  # all but the last answer's and a token at 1.0 s


def test_nothing_measured_is_none_and_not_zero():
    found = figures([FAILED], 1.0)
    assert found["mean_ttft_ms"] is None
    assert found["total_cached_tokens"] is None
    assert found["request_throughput"] == 0


def test_details_have_an_entry_for_every_request():
    rows = details([*RECORDS, FAILED, Record()], texts=True)
    assert {len(values) for values in rows.values()} == {5}
    assert rows["errors"] == ["", "", "", "no", "not finished"]


def test_the_printed_lines_are_those_of_vllm():
    text = show({**figures(RECORDS, 2.0), "max_concurrency": 4})
    assert text.startswith("============ Serving Benchmark Result ============\n")
    for line in ("Successful requests:                     3", "Benchmark duration (s):",
                 "Request throughput (req/s):              1.50", "Mean TTFT (ms):",
                 "Median TPOT (ms):", "P99 ITL (ms):", "Maximum request concurrency:"):  # fmt: skip
        assert f"\n{line}" in text
