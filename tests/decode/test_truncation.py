"""The threshold search against sorting in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.decode.truncation import keep_min_p, keep_top_k, keep_top_p
from tests.decode.naive_sampling import kept_by_min_p, kept_by_top_k, softmax

ROWS, VOCAB = 4, 37
top_k_of = jax.jit(keep_top_k)
top_p_of = jax.jit(keep_top_p)
min_p_of = jax.jit(keep_min_p)
EVERY = np.ones(ROWS, np.bool_)


@st.composite
def logit_rows(draw):
    """Coarse values give many ties; wide ones give dense and sparse regions; some tokens banned."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    step = draw(st.sampled_from([0.0, 0.25, 2.0]))
    scale = draw(st.sampled_from([1e-30, 0.1, 1.0, 8.0, 1e4]))
    x = rng.standard_normal((ROWS, VOCAB)) * scale
    if step:
        x = np.round(x / (scale * step)) * (scale * step)
    banned = rng.random(x.shape) < draw(st.sampled_from([0.0, 0.5, 0.95]))
    banned[:, 0] = False
    return np.where(banned, -np.inf, x).astype(np.float32)


def kept(logits):
    return np.asarray(logits) > -np.inf


def assert_survivors_unchanged(before, after):
    after = np.asarray(after)
    np.testing.assert_array_equal(after[kept(after)], before[kept(after)])


@settings(max_examples=60, deadline=None)
@given(logit_rows(), st.lists(st.integers(1, VOCAB + 3), min_size=ROWS, max_size=ROWS))
def test_top_k_keeps_the_k_largest_and_all_ties_of_the_last(x, top_k):
    out = top_k_of(x, np.asarray(top_k, np.int32), EVERY)
    assert_survivors_unchanged(x, out)
    for row in range(ROWS):
        expected = kept_by_top_k(x[row], top_k[row]) & (x[row] > -np.inf)
        np.testing.assert_array_equal(kept(out)[row], expected)


@settings(max_examples=60, deadline=None)
@given(logit_rows(), st.lists(st.floats(1e-6, 0.999999), min_size=ROWS, max_size=ROWS))
def test_top_p_keeps_the_smallest_set_that_reaches_p_with_ties(x, top_p):
    out = top_p_of(x, np.asarray(top_p, np.float32), EVERY)
    assert_survivors_unchanged(x, out)
    for row in range(ROWS):
        mine, probabilities = kept(out)[row], softmax(x[row])
        least = x[row][mine].min()
        np.testing.assert_array_equal(mine, (x[row] >= least) & (x[row] > -np.inf))
        assert probabilities[mine].sum() >= top_p[row] - 3e-6  # float32 sum of the masses
        assert probabilities[x[row] > least].sum() < top_p[row] + 3e-6


@settings(max_examples=40, deadline=None)
@given(logit_rows(), st.lists(st.floats(1e-4, 1), min_size=ROWS, max_size=ROWS))
def test_min_p_keeps_tokens_at_least_that_likely_relative_to_the_first(x, min_p):
    out = min_p_of(x, np.asarray(min_p, np.float32))
    assert_survivors_unchanged(x, out)
    for row in range(ROWS):
        ratio = softmax(x[row]) / softmax(x[row]).max()
        clear = abs(ratio - min_p[row]) > 1e-6
        np.testing.assert_array_equal(
            kept(out)[row][clear], kept_by_min_p(x[row], min_p[row])[clear]
        )


def test_top_p_of_exact_binary_masses_stops_at_equality():
    x = np.log(np.asarray([[8, 4, 2, 1, 1]] * ROWS, np.float32))
    out = kept(top_p_of(x, np.asarray([0.5, 0.75, 0.76, 0.95], np.float32), EVERY))
    assert out.sum(1).tolist() == [1, 2, 3, 5]  # the last two tie


def test_rows_that_do_not_ask_and_broken_rows_do_not_stall_or_hide():
    x = np.random.default_rng(0).standard_normal((ROWS, VOCAB)).astype(np.float32)
    x[1, 3] = np.nan
    x[2, 5] = np.inf
    x[3] = -np.inf
    for out in (
        top_k_of(x, np.full(ROWS, 2, np.int32), EVERY),
        top_p_of(x, np.full(ROWS, 0.5, np.float32), EVERY),
    ):
        out = np.asarray(out)
        assert np.isnan(out[1, 3])
        assert out[2, 5] == np.inf
        assert (out[3] == -np.inf).all()


@pytest.mark.parametrize("vocab", [5000, 49152])
def test_large_vocabularies_agree_with_sorting_exactly(vocab):
    x = np.random.default_rng(vocab).standard_normal((2, vocab)).astype(np.float32) * 3
    every = np.ones(2, np.bool_)
    for top_k in (1, 50, 4000):
        out = top_k_of(x, np.full(2, top_k, np.int32), every)
        assert kept(out).sum(1).tolist() == [kept_by_top_k(row, top_k).sum() for row in x]
    for top_p in (0.1, 0.9, 0.999):
        out = kept(top_p_of(x, np.full(2, top_p, np.float32), every))
        for row in range(2):
            masses = np.cumsum(np.sort(softmax(x[row]))[::-1])
            low = np.searchsorted(masses, top_p - 3e-6) + 1
            assert low <= out[row].sum() <= np.searchsorted(masses, top_p + 3e-6) + 1


def test_values_down_to_the_smallest_floats_end_the_search():
    magnitudes = 2.0 ** -np.arange(0, 120, 4, dtype=np.float64)
    x = np.concatenate([magnitudes, [0.0], -magnitudes]).astype(np.float32)[None]
    for top_k in range(1, x.shape[1] + 1):
        out = top_k_of(x, np.asarray([top_k], np.int32), np.ones(1, np.bool_))
        assert kept(out).sum() == top_k
    assert jnp.isfinite(x).all()
