import math

import numpy as np
import pytest

from kvjax.benchmarks import intervals
from kvjax.benchmarks.intervals import Interval


def by_hand(of, rows, resamples):
    """The same interval with loops: draw items, take means, sort, interpolate the quantiles."""
    count = len(rows[0])
    found = []
    for draw in np.random.default_rng(0).integers(count, size=(resamples, count)):
        means = [sum(row[i] for i in draw) / count for row in rows]
        found.append(of(*means))
    found.sort()

    def quantile(q):
        place = q * (len(found) - 1)
        low = math.floor(place)
        high = min(low + 1, len(found) - 1)
        return found[low] + (place - low) * (found[high] - found[low])

    return of(*(sum(row) / count for row in rows)), quantile(0.025), quantile(0.975)


A = [0.5, 0.1, 0.9, 0.3, 0.2, 0.8, 0.05]
B = [1.0, 0.4, 1.1, 0.9, 0.6, 1.5, 0.30]


@pytest.mark.parametrize(
    ("found", "of", "rows"),
    [
        (intervals.mean(A, resamples=200), lambda a: a, [A]),
        (intervals.difference(A, B, resamples=200), lambda a, b: a - b, [A, B]),
        (intervals.recovery(A, B, resamples=200), lambda a, b: 1 - a / b, [A, B]),
    ],
)
def test_the_interval_is_that_of_plain_loops(found, of, rows):
    assert (found.value, found.low, found.high) == pytest.approx(by_hand(of, rows, 200))


def test_equal_readings_give_equal_intervals():
    assert intervals.mean(A) == intervals.mean(list(A))
    assert intervals.mean(A, resamples=99) != intervals.mean(A, resamples=99, seed=1)


def test_pairing_cancels_what_items_have_in_common():
    rng = np.random.default_rng(0)
    common = rng.normal(0, 10, 100)
    method = common + rng.normal(0.5, 0.1, 100)
    paired = intervals.difference(method.tolist(), common.tolist())
    apart = intervals.unpaired_difference(method.tolist(), common.tolist())
    assert paired.low > 0
    assert apart.low < 0 < apart.high
    assert paired.value == pytest.approx(apart.value)


def test_a_constant_has_an_interval_of_no_width():
    assert intervals.mean([2.0] * 5) == Interval(2.0, 2.0, 2.0)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        found = intervals.mean(rng.normal(3, 1, 40).tolist(), resamples=400)
        hits += found.low <= 3 <= found.high
    assert 0.88 <= hits / 200 <= 0.98


def test_recovery_is_one_for_no_loss_zero_for_naive_and_negative_for_worse():
    zero = [0.0] * len(B)
    assert intervals.recovery(zero, B) == Interval(1, 1, 1)
    assert intervals.recovery(B, B) == Interval(0, 0, 0)
    assert intervals.recovery([2 * x for x in B], B).value == -1


def test_where_naive_loses_nothing_recovery_is_undefined():
    found = intervals.recovery(A, [0.0] * len(A))
    assert math.isnan(found.value)
    assert found.text() == "-"


def test_resamples_in_which_naive_loses_nothing_are_left_out():
    found = intervals.recovery([0, 0, 0.5], [0, 0, 1.0])
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_intervals_are_written_with_their_bounds():
    assert Interval(0.5, 0.25, 0.75).text(1, 100) == "50.0 [25.0, 75.0]"
    assert Interval(0.5, 0.5, 0.5).text(2) == "0.50"


def test_resampled_items_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        intervals.resampled(3)[0, 0] = 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (([1.0], [1.0, 2.0]), "same items"),
        (([], []), "expected items"),
        (([math.inf], [0.0]), "not finite"),
    ],
)
def test_rows_that_cannot_be_paired_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        intervals.difference(*rows)
