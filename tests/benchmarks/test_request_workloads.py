import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest

from kvjax.benchmarks import workloads
from kvjax.benchmarks.arrivals import Arrivals
from kvjax.benchmarks.workloads import Options, Part, Request, digest, files, traces
from kvjax.benchmarks.workloads.sharing import count

SMALL = Options(
    num_prompts=12, input_len=40, prefix_ratio=0.1, prefix_len=50, context_len=30, num_prefixes=3
)


def build(name, **changes):
    return workloads.build(name, dataclasses.replace(SMALL, **changes))


def prompt(request):
    return [t for part in request.parts for t in part.token_ids]


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_a_workload_is_a_function_of_its_seed(name):
    assert digest(build(name)) == digest(build(name))
    if name not in ("system-prompt", "rag", "relay", "parallel-sampling", "document-qa",
                    "text-to-sql", "multi-turn"):  # fmt: skip
        assert digest(build(name)) != digest(build(name, seed=1))


def test_more_prompts_of_a_seed_begin_with_the_fewer():
    assert build("random", num_prompts=20)[:12] == build("random")


def test_lengths_are_those_that_were_asked_for():
    for request in build("random"):
        assert (len(prompt(request)), request.max_tokens) == (40, 32)
    spread = [len(prompt(r)) for r in build("random", num_prompts=500, range_ratio=0.5)]
    assert (min(spread), max(spread)) == (20, 60)
    assert np.mean(spread) == pytest.approx(40, rel=0.05)


def test_a_shared_prefix_is_shared_by_all_but_the_first_of_its_group():
    found = count(build("shared-prefix"))
    assert found.prompt_tokens == 12 * (50 + 40)
    assert found.prefix_tokens - (12 - 3) * 50 in range(5)  # a first own token may be equal, too
    groups = [tuple(prompt(r)[:50]) for r in build("shared-prefix")]
    assert sorted(groups.count(g) for g in set(groups)) == [4, 4, 4]


def test_nothing_is_shared_with_zero_sharing():
    found = count(build("zero-sharing", num_prompts=300, vocab_size=320))
    assert (found.prefix_tokens, found.passage_tokens) == (0, 0)


def test_a_long_document_is_found_by_passage_and_not_by_prefix():
    requests = build("long-document", num_contexts=5)
    found = count(requests)
    assert found.prefix_tokens + found.passage_tokens == pytest.approx(11 * 5 * 30, abs=12)
    assert found.passage_tokens > 0.7 * 11 * 5 * 30
    orders = {tuple(p.token_ids for p in r.parts if p.passage) for r in requests}
    assert len(orders) == 12
    assert len({frozenset(order) for order in orders}) == 1


def test_a_breaker_leaves_the_suffix_to_reuse_of_passages():
    found = count(build("prefix-suffix", input_len=100, prefix_ratio=0.5))
    assert found.prefix_tokens == 11 * 50
    assert found.passage_tokens == 11 * 18
    with pytest.raises(ValueError, match="input_len must leave room for a breaker of 32"):
        build("prefix-suffix", input_len=36)


def test_stragglers_have_a_heavy_tail_with_a_cap():
    outputs = [r.max_tokens for r in build("stragglers", num_prompts=2000, input_len=2)]
    assert np.median(outputs) == pytest.approx(32, rel=0.1)
    assert np.mean(outputs) == pytest.approx(32 * math.exp(0.5), rel=0.1)
    assert 8 * 32 < max(outputs) <= 16 * 32


def test_the_seven_have_the_sizes_and_the_sharing_that_their_readme_states():
    every = {name: build(name, num_prompts=None) for name in (
        "system-prompt", "rag", "relay", "parallel-sampling", "document-qa", "text-to-sql",
        "multi-turn")}  # fmt: skip
    sizes = {name: len(requests) for name, requests in every.items()}
    assert sizes == {
        "system-prompt": 68, "rag": 155, "relay": 12 * 4, "parallel-sampling": 16,
        "document-qa": 115, "text-to-sql": 72, "multi-turn": 167,
    }  # fmt: skip
    rag = [p for r in every["rag"] for p in r.parts if p.passage]
    assert (len(rag), len(set(rag))) == (905, 200)
    assert pytest.approx(0.779, abs=0.001) == 1 - 200 / 905
    assert count(every["rag"]).passage_share > 0.5
    assert count(every["system-prompt"]).prefix_share > 0.9
    assert count(every["multi-turn"]).prefix_share > 0.9
    assert count(every["document-qa"]).prefix_share > 0.9
    assert all(r.n == 16 for r in every["parallel-sampling"])


def test_a_turn_waits_for_the_answers_that_it_quotes():
    first, second = build("multi-turn", num_prompts=2)
    assert (first.after, second.after) == ((), (0,))
    relay = build("relay", num_prompts=4)
    assert [r.after for r in relay] == [(), (0,), (0, 1), (0, 1, 2)]


def test_files_are_cut_at_whole_conversations():
    rows = [len(row["turns"]) for row in files._rows("w7_agent_multi_turn")]
    assert len(build("multi-turn", num_prompts=rows[0] + rows[1])) == rows[0] + rows[1]


@pytest.mark.parametrize(("name", "rows"), [
    ("mooncake_conversation", 12_031), ("mooncake_synthetic", 3_993), ("azure_code", 8_819),
    ("azure_conversation", 19_366),
])  # fmt: skip
def test_the_traces_have_the_rows_that_their_readme_states(name, rows):
    found = list(traces.read(name))
    assert len(found) == rows
    assert found[0].at == 0
    assert all(row.at >= 0 and row.input_len >= 0 for row in found)


def test_a_replay_keeps_the_blocks_that_requests_share():
    rows = [row for row, _ in zip(traces.read("mooncake_conversation"), range(12), strict=False)]
    requests = build("trace", trace_scale=Fraction(1, 64), trace_speed=2.0)
    for row, request in zip(rows, requests, strict=True):
        assert len(prompt(request)) == round(row.input_len / 64)
        assert request.max_tokens == max(1, round(row.output_len / 64))
        assert request.at == row.at / 2
        assert prompt(request)[:8] == prompt(requests[0])[:8]  # all begin with block 0
    seen, shared = set(rows[0].blocks), 0
    for row in rows[1:]:
        shared += len(set(row.blocks) & seen)
        seen |= set(row.blocks)
    assert count(requests).prefix_tokens == pytest.approx(8 * shared, abs=8)


def test_an_unknown_workload_or_trace_is_named():
    with pytest.raises(ValueError, match=r"unknown workload 'x'; there are random, shared-prefix"):
        build("x")
    with pytest.raises(ValueError, match="'x' is no trace of mooncake_conversation"):
        build("trace", trace="x")


def test_a_workload_from_elsewhere_joins_by_an_entry(monkeypatch):
    mine = [Request((Part("Hello"),), 3)]
    monkeypatch.setitem(workloads.WORKLOADS, "mine", lambda options: mine)
    assert workloads.build("mine", SMALL) == mine


@pytest.mark.parametrize(("name", "value"), [
    ("input_len", 0), ("num_prompts", 0), ("range_ratio", 1.0), ("vocab_size", 3), ("seed", -1),
    ("trace_speed", 0.0),
])  # fmt: skip
def test_options_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=str(value)):
        dataclasses.replace(SMALL, **{name: value})


REQUESTS = [Request((Part("a"),), 1)] * 4000


def test_all_at_once_is_no_delay():
    assert set(Arrivals().times(REQUESTS, 0)) == {0.0}


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_burstiness_asked_for(burstiness):
    times = Arrivals(request_rate=10, burstiness=burstiness).times(REQUESTS, 0)
    gaps = np.diff([0.0, *times])
    assert gaps.mean() == pytest.approx(0.1, rel=0.1)
    assert (gaps.std() / gaps.mean()) ** 2 == pytest.approx(1 / burstiness, rel=0.2)
    assert times == Arrivals(request_rate=10, burstiness=burstiness).times(REQUESTS, 0)
    assert times != Arrivals(request_rate=10, burstiness=burstiness).times(REQUESTS, 1)


@pytest.mark.parametrize(("strategy", "middle"), [("linear", 10.5), ("exponential", 20**0.5)])
def test_a_ramp_goes_from_one_rate_to_the_other(strategy, middle):
    ramp = Arrivals(ramp_up_strategy=strategy, ramp_up_start_rps=1, ramp_up_end_rps=20)
    rates = ramp.rates(101)
    assert (rates[0], rates[50], rates[100]) == pytest.approx((1, middle, 20))


def test_a_trace_is_sent_when_it_says():
    requests = build("trace")
    assert Arrivals(self_timed=True).times(requests, 0) == [r.at for r in requests]
    with pytest.raises(ValueError, match="needs a workload with time stamps"):
        Arrivals(self_timed=True).times(REQUESTS, 0)


@pytest.mark.parametrize("changes", [{"request_rate": 0}, {"burstiness": -1}, {
    "ramp_up_strategy": "square"}, {"ramp_up_strategy": "linear", "request_rate": 2}])  # fmt: skip
def test_arrivals_that_make_no_sense_are_refused(changes):
    with pytest.raises(ValueError, match=r"request_rate|burstiness|square"):
        Arrivals(**changes)
