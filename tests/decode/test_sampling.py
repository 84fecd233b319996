"""Greedy rows, broken rows, log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.decode import DecodeState, RowRequest, pack_rows, row_argmax, sample
from kvjax.request import SamplingParams

step = jax.jit(sample)
GREEDY = SamplingParams(temperature=0)
ROWS, VOCAB = 8, 300


def request(params, row=0, **rest):
    return RowRequest(row, params, **{"seed": 1000 + row, "position": 10 + row, **rest})


def some_logits(seed=0):
    return np.random.default_rng(seed).standard_normal((ROWS, VOCAB)).astype(np.float32) * 3


def some_state():
    return DecodeState.allocate(ROWS, VOCAB)


def test_greedy_takes_the_lowest_index_of_a_tie_and_a_nan_wins():
    x = jnp.asarray([[1, 3, 3, 0], [-np.inf, -1, -2, -1], [9, np.nan, 1, 2]], jnp.float32)
    assert np.asarray(row_argmax(x)).tolist() == [1, 1, 1]


def test_a_greedy_row_is_greedy_whatever_its_batch_mates_do():
    logits = some_logits()
    wild = SamplingParams(temperature=2.0, top_p=0.9, top_k=7, min_p=0.01, seed=1)
    params = [GREEDY, wild, SamplingParams(temperature=1e-6, top_k=3), wild, GREEDY, wild]
    rows = pack_rows([request(p, row) for row, p in enumerate(params)], ROWS, ROWS)
    drawn = np.asarray(step(logits, some_state(), rows)[0])
    np.testing.assert_array_equal(drawn[[0, 2, 4]], logits.argmax(1)[[0, 2, 4]])


def test_a_row_with_nan_or_infinity_is_reported_and_harms_no_other():
    logits = some_logits()
    clean = logits.copy()
    logits[1, 20], logits[2, 30] = np.nan, np.inf
    params = SamplingParams(top_p=0.8, top_k=20)
    rows = pack_rows([request(params, row) for row in range(4)], ROWS, ROWS)
    state = some_state()
    tokens, _, out = step(logits, state, rows)
    assert np.asarray(out.healthy)[:4].tolist() == [True, False, False, True]
    expected = np.asarray(step(clean, state, rows)[0])
    np.testing.assert_array_equal(np.asarray(tokens)[[0, 3]], expected[[0, 3]])


def test_logprobs_ranks_and_top_tokens_are_those_of_the_raw_logits():
    logits = some_logits()
    logits[1, 40:60] = logits[1].max()  # ties
    asks = SamplingParams(temperature=3.0, top_k=200, min_tokens=9, logprobs=4)
    silent = SamplingParams(temperature=3.0)
    rows = pack_rows([request(asks if row % 2 else silent, row) for row in range(ROWS)], ROWS, ROWS)
    out = jax.tree.map(np.asarray, step(logits, some_state(), rows)[2])
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    for row in range(ROWS):
        if not rows.want_logprobs[row]:
            assert np.isnan(out.logprobs[row])
            assert out.ranks[row] == -1
            assert (out.top_ids[row] == -1).all()
            assert np.isnan(out.top_logprobs[row]).all()
            continue
        token = out.tokens[row]
        assert out.logprobs[row] == pytest.approx(exact[row, token], abs=1e-5)
        assert out.ranks[row] == 1 + (logits[row] > logits[row, token]).sum()
        best = np.argsort(-logits[row], kind="stable")[:20]
        np.testing.assert_array_equal(out.top_ids[row], best)
        np.testing.assert_allclose(out.top_logprobs[row], exact[row, best], atol=1e-5)


def test_a_forced_token_is_reported_instead_of_drawn():
    logits = np.random.default_rng(3).standard_normal((2, 9)).astype(np.float32)
    rows = pack_rows([request(GREEDY, 0, forced_token=4, active=False, want_logprobs=True)], 2, 2)
    _, state, out = step(logits, DecodeState.allocate(2, 9), rows)
    exact = logits[0] - np.log(np.exp(logits[0].astype(np.float64)).sum())
    assert out.tokens[0] == 4
    assert out.logprobs[0] == pytest.approx(exact[4], abs=1e-5)
    assert np.asarray(out.top_ids)[0, 9:].tolist() == [-1] * 11  # nine tokens only
    assert np.asarray(state.last_tokens).tolist() == [0, 0, 0]


def test_logits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"expected logits \[2, 9\], got \(2, 8\)"):
        sample(jnp.zeros((2, 8)), DecodeState.allocate(1, 9), pack_rows([], 2, 1))


def test_bfloat16_logits_are_sampled_in_float32():
    x = jnp.asarray(some_logits(), jnp.bfloat16)
    rows = pack_rows([request(SamplingParams(top_p=0.9, logprobs=1))], ROWS, ROWS)
    mine = step(x, some_state(), rows)[2]
    expected = step(x.astype(np.float32), some_state(), rows)[2]
    jax.tree.map(np.testing.assert_array_equal, mine, expected)
