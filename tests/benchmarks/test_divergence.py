import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.benchmarks.divergence import (
    agreement,
    jaccard,
    jaccard_by_chance,
    kendall_tau,
    kl_divergence,
    log_softmax,
    ranks,
    same_top,
    spearman,
)

LOGITS = st.lists(st.floats(-50, 50), min_size=3, max_size=3)
VALUES = st.lists(st.integers(-4, 4), min_size=2, max_size=8)


def test_kl_of_a_fair_and_a_biased_coin_by_hand():
    fair, biased = np.log([0.5, 0.5]), np.log([0.9, 0.1])
    assert kl_divergence(fair, biased) == pytest.approx(0.5 * math.log(0.25 / 0.09))
    assert kl_divergence(biased, fair) == pytest.approx(
        0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    )


@given(LOGITS, LOGITS, st.floats(-100, 100))
def test_kl_is_not_negative_and_ignores_what_softmax_ignores(a, b, shift):
    found = float(kl_divergence(a, b))
    assert found >= 0
    assert float(kl_divergence(np.add(a, shift), b)) == pytest.approx(found, abs=1e-9)


@given(LOGITS)
def test_kl_to_itself_is_zero(row):
    assert kl_divergence(row, row) == 0


def test_kl_is_per_row_and_in_float64():
    a = np.array([[0, 1e-4], [0, 0]], np.float32)
    b = np.zeros((2, 2), np.float32)
    found = kl_divergence(a, b)
    assert found.shape == (2,)
    x = float(np.float32(1e-4))
    p = 1 / (1 + math.exp(x))
    exact = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    assert found[0] == pytest.approx(exact, rel=1e-4)  # 1e-9: nothing of it is left in float32
    assert found[1] == 0


def test_a_token_that_cannot_come_adds_nothing_and_one_that_only_the_other_excludes_is_inf():
    assert kl_divergence([0, 0, -np.inf], [0, 0, 0]) == pytest.approx(math.log(1.5))
    assert kl_divergence([0, 0], [0, -np.inf]) == np.inf


def test_large_logits_do_not_overflow():
    assert log_softmax([1e4, 1e4]) == pytest.approx([-math.log(2)] * 2)


@pytest.mark.parametrize("rows", [([0, 0], [0, 0, 0]), ([np.nan, 0], [0, 0])])
def test_rows_that_cannot_be_compared_are_refused(rows):
    with pytest.raises(ValueError, match=r"shape|maximum"):
        kl_divergence(*rows)


def test_the_first_of_equal_maxima_is_the_top():
    assert same_top([[1, 1, 0], [0, 2, 1]], [[3, 0, 3], [0, 1, 2]]).tolist() == [True, False]


def test_agreement_is_by_place_and_over_the_reference():
    assert agreement([1, 2, 3, 4], [1, 9, 3]) == 0.5
    assert agreement([], [1]) == 1


def test_jaccard_by_hand():
    assert jaccard({1, 2, 3}, {2, 3, 4}) == 0.5
    assert jaccard(set(), set()) == 1
    assert jaccard({1}, set()) == 0


def test_two_random_choices_of_15_percent_overlap_by_8_percent():
    assert jaccard_by_chance(0.15) == pytest.approx(0.081, abs=5e-4)
    rng = np.random.default_rng(0)
    pairs = [[set(rng.permutation(2000)[:300]) for _ in "ab"] for _ in range(50)]
    assert np.mean([jaccard(a, b) for a, b in pairs]) == pytest.approx(0.081, abs=2e-3)
    with pytest.raises(ValueError, match="got 2"):
        jaccard_by_chance(2)


def test_ranks_of_ties_are_their_mean():
    assert ranks([10, 30, 20, 20]).tolist() == [1, 4, 2.5, 2.5]


def test_spearman_by_hand():
    # rank differences 1, 1, 0, 2, 2: 1 - 6 * 10 / (5 * 24)
    assert spearman([1, 2, 3, 4, 5], [2, 1, 3, 6, 4.5]) == pytest.approx(1 - 6 * 4 / 120)
    assert spearman([1, 2, 3], [9, 8, 7]) == pytest.approx(-1)


def test_kendall_by_hand():
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)  # one of six discordant
    assert kendall_tau([1, 2, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(2 * 3))  # one tie


@given(VALUES, st.randoms(use_true_random=False))
def test_kendall_is_that_of_counting_pairs(a, rng):
    b = [rng.randint(-4, 4) for _ in a]
    score = ties_a = ties_b = 0
    pairs = [(i, j) for j in range(len(a)) for i in range(j)]
    for i, j in pairs:
        score += (a[i] > a[j]) - (a[i] < a[j]) if b[i] > b[j] else 0
        score -= (a[i] > a[j]) - (a[i] < a[j]) if b[i] < b[j] else 0
        ties_a += a[i] == a[j]
        ties_b += b[i] == b[j]
    size = math.sqrt((len(pairs) - ties_a) * (len(pairs) - ties_b))
    found = kendall_tau(a, b)
    assert math.isnan(found) if size == 0 else found == pytest.approx(score / size)


@given(VALUES)
def test_rank_correlations_ignore_monotone_changes(a):
    cubed = [x**3 for x in a]
    for of in (spearman, kendall_tau):
        found = of(a, cubed)
        assert math.isnan(found) if len(set(a)) == 1 else found == pytest.approx(1)


def test_rows_of_different_lengths_have_no_correlation():
    with pytest.raises(ValueError, match="got 2 and 3"):
        kendall_tau([1, 2], [1, 2, 3])
