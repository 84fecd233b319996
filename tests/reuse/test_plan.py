import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.errors import InvalidPlan
from kvjax.reuse.forward import rung
from kvjax.reuse.plan import (
    Spans,
    Stage,
    StagedPlan,
    TopK,
    indices_to_spans,
    rest_of,
    spans_to_indices,
    validate,
)

ALL = Spans(((0, 20),))
ALWAYS = np.arange(15, 20)


def check(*stages: Stage) -> None:
    validate(StagedPlan(stages), 4, 21, ALWAYS)


def test_cacheblend_and_fusionrag_are_valid_plans():
    check(Stage(0, 2, ALL), Stage(2, 4, TopK("value_deviation", 3)))
    check(Stage(0, 4, Spans(((15, 20),))), Stage(0, 4, TopK("question_attention", 3)))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "at least one stage"),
        ((Stage(0, 5, ALL),), "within 4 layers"),
        ((Stage(1, 4, ALL),), "without hidden states"),
        ((Stage(0, 2, ALL), Stage(3, 4, ALL)), "must start at layer 2"),
        ((Stage(0, 2, ALL),), "ends at layer 2 of 4"),
        ((Stage(0, 4, TopK("x", 1)),), "nothing has run"),
        ((Stage(0, 2, ALL), Stage(2, 4, TopK("x", -1))), "must not be negative"),
        ((Stage(0, 2, Spans(((9, 20),))), Stage(2, 4, ALL)), "must be nested"),
        ((Stage(0, 2, ALL), Stage(2, 4, Spans(((15, 18),)))), "leaves out row 18"),
        ((Stage(0, 4, Spans(((5, 3),))),), "spans ascend"),
        ((Stage(0, 4, Spans(((0, 22),))),), "end by 21"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(stages, message):
    with pytest.raises(InvalidPlan, match=message):
        check(*stages)


def test_what_always_runs_may_be_named_above_a_choice():
    check(
        Stage(0, 1, ALL), Stage(1, 2, TopK("value_deviation", 3)), Stage(2, 4, Spans(((15, 20),)))
    )


@given(st.sets(st.integers(0, 60)))
def test_spans_and_indices_say_the_same(indices):
    spans = indices_to_spans(sorted(indices))
    assert spans_to_indices(spans).tolist() == sorted(indices)
    rest = spans_to_indices(rest_of(spans, 0, 61)).tolist()
    assert sorted([*rest, *indices]) == list(range(61))


@given(st.integers(1, 100_000))
def test_a_rung_holds_its_size_with_little_padding(n):
    assert n <= rung(n) <= max(n * 1.25, n + 31)
