"""Attention mass against the float64 oracle and against probabilities written out."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.pallas_kernels import LayerPages, attention_mass
from tests.pallas_kernels import attention_cases
from tests.pallas_kernels.attention_cases import Heads, Problem, causal, problem
from tests.pallas_kernels.test_paged_attention import LENGTHS, scattered

HEADS = Heads(4, 2, 32)
_compiled: dict[Any, Any] = {}


def mass(p: Problem, lse, segment_starts, *, backend: str = "xla") -> Any:
    def call(q, lse, pages, tables, starts, kv_lens, lo, hi, segment_starts, tail_mask):
        return attention_mass(
            q, lse, pages, tables, starts, kv_lens, lo, hi, scale=q.shape[-1] ** -0.5,
            segment_starts=segment_starts, tail_mask=tail_mask, soft_cap=p.soft_cap,
            value_width=p.value_width, backend=backend,
        )  # fmt: skip

    run = call
    if backend != "reference":
        run = _compiled.setdefault((p.soft_cap, p.value_width, backend), jax.jit(call))
    return run(
        p.q, lse, p.pages, p.block_tables, p.query_starts, p.kv_lens, p.lo, p.hi, segment_starts,
        p.tail_mask,
    )  # fmt: skip


def segments_of(p: Problem) -> np.ndarray:
    """Three segments per sequence with a hole before the first and an empty one."""
    n = p.kv_lens[:, None]
    return np.concatenate([n // 9, n // 3, n // 3, n], axis=1).astype(np.int32)


def assert_matches_reference(p: Problem) -> None:
    _, lse = attention_cases.attend(p, backend="reference")
    lse = lse.astype(np.float32)
    got, want = (mass(p, lse, segments_of(p), backend=b) for b in ("xla", "reference"))
    tolerance = 1e-2 if p.pages.k.dtype == np.uint16 else 1e-5
    np.testing.assert_allclose(got.columns, want.columns, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(got.segments, want.segments, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("physical", [np.float32, np.uint16, np.int8, np.uint8])
@pytest.mark.parametrize("tail", [0, 2])
def test_ragged_sequences_match_the_oracle(physical, tail):
    assert_matches_reference(
        problem(1, HEADS, LENGTHS, num_tokens=96, physical=physical, tail_words=tail, soft_cap=4.0)
    )


@pytest.mark.parametrize("heads", [Heads(9, 3, 64), Heads(4, 1, 40, latent=32)], ids=str)
def test_head_shapes_match_the_oracle(heads):
    assert_matches_reference(problem(2, heads, LENGTHS, num_tokens=96, soft_cap=4.0))


@settings(max_examples=30, deadline=None)
@given(scattered(), st.integers(0, 2**32 - 1))
def test_any_interval_matches_the_oracle_and_nobody_else_is_read(seqs, seed):
    assert_matches_reference(problem(seed, HEADS, seqs, num_tokens=16, soft_cap=4.0))


def test_the_columns_of_a_row_that_sees_all_sum_to_one_per_head():
    p = problem(3, HEADS, [(300, causal(300, 2)), (17, causal(17, 1))])
    _, lse = attention_cases.attend(p, backend="xla")
    got = mass(p, lse, np.array([[0, 299, 300], [0, 3, 17]], np.int32))
    np.testing.assert_allclose(got.columns.sum(axis=1), [2 * 4, 4], rtol=1e-5)
    np.testing.assert_allclose(got.segments.sum(axis=1), [4, 4, 4], rtol=1e-5)
    assert np.asarray(got.segments)[0, 1] == 0  # the row before the last does not see index 299


def test_mass_over_the_segments_is_mass_over_their_columns():
    p = problem(4, HEADS, [(280, causal(280, 1))])
    _, lse = attention_cases.attend(p, backend="xla")
    edges = np.array([[5, 100, 256, 280]], np.int32)
    got = mass(p, lse, edges)
    want = [np.asarray(got.columns)[0, a:b].sum() for a, b in zip(edges[0], edges[0, 1:])]  # noqa: B905
    np.testing.assert_allclose(got.segments[0], want, rtol=1e-5)


def test_rows_that_are_not_to_count_get_an_empty_interval():
    p = problem(5, HEADS, [(60, causal(60, 4))])
    _, lse = attention_cases.attend(p, backend="xla")
    quiet = dataclasses.replace(p, hi=np.where(np.arange(4) == 2, p.hi, 0).astype(np.int32))
    want = mass(p.alone([2]), lse[[2]], np.array([[0, 60]], np.int32))
    got = mass(quiet, lse, np.array([[0, 60]], np.int32))
    np.testing.assert_allclose(got.columns, want.columns, atol=1e-6)
    assert not np.asarray(got.segments)[[0, 1, 3]].any()


def counts_what_a_row_does_not_see(p: Problem, lse):
    return mass(dataclasses.replace(p, hi=p.hi + 1), lse, segments_of(p))


def forgets_to_normalise(p: Problem, lse):
    return mass(p, lse * 0, segments_of(p))


def sums_over_one_head_only(p: Problem, lse):
    return mass(p, np.where(np.arange(4) == 0, lse, -np.inf), segments_of(p))


@pytest.mark.parametrize(
    "bug", [counts_what_a_row_does_not_see, forgets_to_normalise, sums_over_one_head_only]
)
def test_a_planted_bug_is_caught(bug):
    p = problem(6, HEADS, [(60, [(0, 11), (0, 30), (0, 31)]), (33, [(2, 33)])])
    _, lse = attention_cases.attend(p, backend="xla")
    want = mass(p, lse, segments_of(p), backend="reference")
    np.testing.assert_allclose(mass(p, lse, segments_of(p)).columns, want.columns, atol=1e-5)
    assert not np.allclose(bug(p, lse).columns, want.columns, atol=1e-3)


def test_segments_can_be_left_out():
    p = problem(7, HEADS, [(60, causal(60, 4))])
    _, lse = attention_cases.attend(p, backend="xla")
    assert mass(p, lse, None).segments is None


def test_nothing_the_size_of_the_pool_is_made():
    num_pages = 8192
    pool: Any = jax.ShapeDtypeStruct((num_pages, 3, 16, 64), np.uint16)
    ints = {n: jax.ShapeDtypeStruct((n,), np.int32) for n in (8, 9)}
    lowered = jax.jit(lambda *args: attention_mass(*args, scale=0.125)).lower(
        jax.ShapeDtypeStruct((8, 9, 64), np.float32), jax.ShapeDtypeStruct((8, 9), np.float32),
        LayerPages(pool, pool), jax.ShapeDtypeStruct((8, 16), np.int32),
        ints[9], ints[8], ints[8], ints[8],
    )  # fmt: skip
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.1 * num_pages * 3 * 16 * 64 * 2


@pytest.mark.parametrize(
    ("lse", "segments", "message"),
    [((4, 3), None, "an lse per token"), ((4, 4), (2, 3), "segment_starts must be")],
)
def test_shapes_that_do_not_fit_are_refused(lse, segments, message):
    p = problem(8, HEADS, [(60, causal(60, 4))])
    segment_starts = None if segments is None else jnp.zeros(segments, jnp.int32)
    with pytest.raises(ValueError, match=message):
        mass(p, np.zeros(lse, np.float32), segment_starts)
