import math

import pytest

from kvjax.benchmarks import intervals, reuse_claims, reuse_methods, reuse_table
from kvjax.benchmarks.reuse_claims import Claim, Term, less
from kvjax.benchmarks.reuse_results import Results
from tests.benchmarks.readings import reading

MANIFEST = {
    "commit": "abc", "started": "now", "split": "held_out", "size": "small", "seed": 0,
    "about": {"model": "m"}, "machine": {"cpu": "Some CPU"},
}  # fmt: skip
NAIVE = [1.0, 2.0, 3.0, 2.0, 1.5, 2.5]


def results(**by_method):
    """Readings on lookup; a list of divergences or of readings per method."""
    found = Results(dict(MANIFEST), {}, {}, {})
    for method, rows in by_method.items():
        spec = next(
            (m.spec for m in reuse_methods.METHODS if m.spec.replace("=", "_")
             .replace(":", "_").replace(".", "") == method), method,
        )  # fmt: skip
        for item, row in enumerate(rows):
            made = row if not isinstance(row, int | float) else reading(row)
            found.readings["lookup", str(item), spec] = made
    return found


def table_rows(text):
    """First column -> the other cells, of the first table of a text."""
    block = next(b for b in text.split("\n\n") if b.startswith("| method"))
    lines = [line.strip("| ").split(" | ") for line in block.splitlines()]
    return {cells[0]: cells[1:] for cells in lines[2:]}, lines[0]


def test_the_columns_are_those_that_were_specified():
    _, head = table_rows(reuse_table.markdown(results(naive=NAIVE)))
    assert head[:9] == ["method", "KL_1 (nats)", "KL_ans (nats)", "recovery (%)", "Top1 (%)",
                        "EM_rel (%)", "KVdev mid layer", "recomputed layer-tokens (%)",
                        "stored bytes/token"]  # fmt: skip


def test_cells_are_means_with_their_intervals():
    half = [
        reading(x / 2, top1=i < 3, computed_layer_tokens=60, stored_bytes_per_token=23040.0,
                copied_tokens=90, prefill_s=0.25)
        for i, x in enumerate(NAIVE)
    ]  # fmt: skip
    rows, _ = table_rows(reuse_table.markdown(results(naive=NAIVE, cacheblend_ratio_015=half)))
    cells = rows["CacheBlend 15 %"]
    assert cells[1] == intervals.mean([x / 2 for x in NAIVE]).text(4)
    assert cells[1].startswith("1.0000 [")
    assert cells[2] == "50.0"  # every item at half: an interval of no width
    assert cells[3].startswith("50.0 [")
    assert cells[5:] == ["0.1000", "20.0", "23,040", "-", "90", "250.0"]
    assert rows["naive, re-rotated"][2] == "0.0"


def test_em_rel_counts_only_what_full_prefill_solves():
    full = [reading(0, solved=i < 4) for i in range(6)]
    naive = [reading(1, solved=i in (0, 5)) for i in range(6)]
    found = reuse_table.solved_again(results(full=full, naive=naive), "lookup", "naive")
    assert found.value == 0.25


def test_em_rel_is_undefined_where_full_prefill_solves_nothing():
    full = [reading(0, solved=None)] * 3
    rows, _ = table_rows(reuse_table.markdown(results(full=full, naive=NAIVE[:3])))
    assert rows["naive, re-rotated"][4] == "-"


def test_the_gold_answer_is_compared_with_full_prefill_item_by_item():
    full = [reading(0, gold_logprob=x) for x in (-1.0, -2.0, None)]
    naive = [reading(1, gold_logprob=x) for x in (-1.5, -4.5, -3.0)]
    found = results(full=full, naive=naive)
    assert reuse_table.gold_loss(found, "lookup", "naive").value == -1.5
    assert reuse_table.gold_loss(found, "lookup", "full").text(1) == "0.0"
    assert "### C1, lookup: 3 items, full prefill solves 3 of 3" in reuse_table.markdown(found)


def test_without_naive_there_is_no_recovery():
    rows, _ = table_rows(reuse_table.markdown(results(full=[0.0, 0.0])))
    assert rows["full prefill"][2] == "-"


def test_a_method_that_lacks_items_says_how_many_it_has():
    rows, _ = table_rows(reuse_table.markdown(results(naive=NAIVE, epic_k_16=NAIVE[:2])))
    assert "EPIC-16 (2 items) " in f"{next(iter(k for k in rows if 'EPIC' in k))} "


def shares(kls, share):
    return [reading(kl, computed_layer_tokens=round(300 * share)) for kl in kls]


def test_a_method_no_better_than_random_at_equal_budget_is_marked_and_a_better_one_is_not():
    worse = [x - 0.2 if i % 2 else x + 0.2 for i, x in enumerate(NAIVE)]
    better = [x / 10 for x in NAIVE]
    text = reuse_table.markdown(
        results(naive=shares(NAIVE, 0.05), random_ratio_015=shares(NAIVE, 0.2),
                cacheblend_ratio_015=shares(better, 0.25), epic_k_16=shares(worse, 0.2))
    )  # fmt: skip
    rows, _ = table_rows(text)
    assert "EPIC-16 †" in rows
    assert "CacheBlend 15 %" in rows
    assert "- EPIC-16 (20.0 % computed) is no better than random 15 % (20.0 %): KL_ans" in text
    assert "- CacheBlend 15 % (25.0 % computed) is better than random 15 % (20.0 %)" in text


def test_random_at_another_budget_is_no_control():
    found = results(random_ratio_015=shares(NAIVE, 0.2), epic_k_16=shares(NAIVE, 0.5))
    assert reuse_table.against_random(found, "lookup", "epic:k=16") is None


def test_the_nearest_budget_is_the_control():
    found = results(
        random_ratio_015=shares(NAIVE, 0.2), random_ratio_03=shares(NAIVE, 0.35),
        epic_k_16=shares(NAIVE, 0.32),
    )  # fmt: skip
    against = reuse_table.against_random(found, "lookup", "epic:k=16")
    assert against is not None
    assert against.control == "random:ratio=0.3"


def test_controls_are_not_compared_with_themselves():
    found = results(naive=NAIVE, random_ratio_015=NAIVE)
    assert reuse_table.against_random(found, "lookup", "naive") is None


def test_errors_and_further_numbers_are_shown():
    found = results(naive=[reading(1, extra={"top_overlap": 0.5})] * 2)
    found.errors["lookup", "7", "hcache"] = "ValueError: no"
    text = reuse_table.markdown(found)
    assert "- lookup 7 hcache: ValueError: no" in text
    assert "- naive, re-rotated, top overlap: 0.5000" in text


def test_every_line_of_a_table_has_the_same_number_of_cells():
    for block in reuse_table.markdown(results(naive=NAIVE, full=NAIVE)).split("\n\n"):
        if block.startswith("|"):
            assert len({line.count(" | ") for line in block.splitlines()[2:]}) <= 1


@pytest.mark.parametrize(
    ("a", "verdict"),
    [
        ([x / 2 for x in NAIVE], "confirmed"),
        ([x * 2 for x in NAIVE], "refuted"),
        ([x + (0.3 if i % 2 else -0.3) for i, x in enumerate(NAIVE)], "undecided"),
        ([], "not measured"),
    ],
)
def test_a_claim_of_order_follows_its_interval(a, verdict):
    found = results(naive=a, naive_no_rotation=NAIVE)
    claim = Claim("", "", less("naive", "naive_no_rotation"))
    value = reuse_claims.evaluate(found, "lookup", claim)
    assert reuse_claims.Finding("", "", "", "", value).verdict == verdict


def test_a_claim_is_a_weighted_sum_of_means():
    found = results(naive=NAIVE, hcache=[1.0] * 6)
    claim = Claim("", "", (Term(2, "KL_ans", "hcache"), Term(-0.5, "KL_ans", "naive")), None, 3)
    value = reuse_claims.evaluate(found, "lookup", claim)
    assert value is not None
    assert value.value == pytest.approx(2 - 0.5 * 2 + 3)
    assert value.high - value.low == pytest.approx(
        0.5 * (intervals.mean(NAIVE).high - intervals.mean(NAIVE).low)
    )
    assert reuse_claims.formula(claim) == ("2 KL_ans(HCache) - 0.5 KL_ans(naive, re-rotated) + 3")


def test_every_claim_names_methods_and_metrics_of_the_table():
    for claim in reuse_claims.CLAIMS:
        for term in claim.terms:
            assert term.method in reuse_methods.BY_SPEC
            assert term.metric in reuse_claims.METRICS


def test_a_deviation_that_is_highest_in_the_middle_has_a_negative_excess():
    assert reuse_claims.u_excess(reading(kv_deviation=(0, 0, 4, 4, 1, 1))) == 1 - 4
    assert reuse_claims.u_excess(reading(kv_deviation=(3, 3, 1, 1, 0, 0))) == 3 - 1


def test_a_claim_on_a_number_that_the_method_does_not_report_is_not_measured():
    found = results(relaycaching=NAIVE)
    claim = Claim("", "", (Term(1, "decode KVdev", "relaycaching"),))
    assert reuse_claims.evaluate(found, "lookup", claim) is None


def test_reach_is_that_of_the_best_strategy_and_never_of_oracle_or_random():
    found = results(
        naive=NAIVE, oracle_ratio_015=[0.0] * 6, random_ratio_015=[0.0] * 6,
        cacheblend_ratio_015=[x / 2 for x in NAIVE], cachecraft_ratio_015=[x / 10 for x in NAIVE],
    )  # fmt: skip
    lookup, binding = reuse_claims.reach(found)
    assert lookup.formula == "KL_ans(Cache-Craft 15 %) - 0.2 KL_ans(naive, re-rotated)"
    assert lookup.verdict == "confirmed"
    assert binding.verdict == "not measured"


def test_one_hop_against_binding_is_not_paired():
    found = results(naive=[0.1, 0.2, 0.1])
    for item, kl in enumerate([1.0, 1.2, 0.8, 1.1]):
        found.readings["binding", str(item), "naive"] = reading(kl)
    finding = reuse_claims.single_hop_survives(found)
    assert finding.value is not None
    assert finding.value.value == pytest.approx(0.4 / 3 - 4.1 / 4)
    assert finding.verdict == "confirmed"
    assert not math.isnan(finding.value.low)
