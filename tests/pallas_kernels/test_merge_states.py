"""Merging parts of an attention: equal to the specification, and to attention over the whole."""

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvjax.pallas_kernels

merge_states: Any = kvjax.pallas_kernels.merge_states  # takes numpy too
jit_merge = jax.jit(merge_states)


def parts_of(scores, values, cuts):
    """Output and lse of each piece of the keys; a piece without keys is NaN with no mass."""
    o, lse = [], []
    for piece in np.split(np.arange(scores.shape[-1]), cuts):
        with np.errstate(divide="ignore", invalid="ignore"):
            weights = np.exp(scores[..., piece])
            lse.append(np.log(weights.sum(axis=-1)))
            o.append(weights @ values[piece] / weights.sum(axis=-1, keepdims=True))
    return np.stack(o).astype(np.float32), np.stack(lse).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=3, max_size=3).map(sorted),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1.0, 30.0]),
)
def test_parts_of_the_keys_merge_into_the_whole(cuts, seed, loudness):
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((5, 3, 12)) * loudness
    values = rng.standard_normal((12, 8))
    (whole,), (want,) = parts_of(scores, values, [])
    o, lse = jit_merge(*parts_of(scores, values, cuts))
    np.testing.assert_allclose(o, whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, want, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_it_is_the_specification_with_any_rows_empty(seed, share):
    rng = np.random.default_rng(seed)
    lse = rng.standard_normal((3, 5, 3)).astype(np.float32) * 40
    lse[rng.random(lse.shape) < share] = -np.inf
    o = rng.standard_normal((3, 5, 3, 8)).astype(np.float32)
    o[lse == -np.inf] = np.nan
    want = merge_states(o, lse, backend="reference")
    for got, expected in zip(jit_merge(o, lse), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_row_that_no_part_saw_is_zero_with_no_mass():
    o = np.full((2, 1, 1, 4), np.nan, np.float32)
    merged, lse = jit_merge(o, np.full((2, 1, 1), -np.inf, np.float32))
    np.testing.assert_array_equal(merged, 0)
    np.testing.assert_array_equal(lse, -np.inf)


def test_the_order_of_the_parts_does_not_matter_beyond_rounding():
    rng = np.random.default_rng(1)
    o, lse = rng.standard_normal((4, 5, 3, 8)), rng.standard_normal((4, 5, 3))
    forth, back = jit_merge(o, lse), jit_merge(o[::-1], lse[::-1])
    np.testing.assert_allclose(forth[0], back[0], atol=1e-6)


def averages(o, lse):
    """A planted bug: parts count alike."""
    return o.mean(axis=0), lse.max(axis=0)


def forgets_the_lse(o, lse):
    """A planted bug: the merged lse is that of the largest part."""
    return merge_states(o, lse)[0], lse.max(axis=0)


@pytest.mark.parametrize("bug", [averages, forgets_the_lse])
def test_a_planted_bug_is_caught(bug):
    rng = np.random.default_rng(2)
    o, lse = rng.standard_normal((2, 5, 3, 8)), rng.standard_normal((2, 5, 3))
    want = merge_states(o, lse, backend="reference")
    assert any(not np.allclose(x, y, atol=1e-3) for x, y in zip(bug(o, lse), want, strict=True))


@pytest.mark.parametrize("lse", [(2, 5, 4), (2, 5)])
def test_shapes_that_do_not_fit_are_refused(lse):
    with pytest.raises(ValueError, match=r"lse\.shape"):
        merge_states(np.zeros((2, 5, 3, 8)), np.zeros(lse))
