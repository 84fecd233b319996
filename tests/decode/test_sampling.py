"""Draws: greedy, distribution, independence of batch mates, log-probabilities."""

import jax
import numpy as np
import pytest

from kvjax.decode import (
    DecodeState,
    RowRequest,
    load_seat,
    pack_rows,
    row_argmax,
    sample,
    sampling,
    seat_features,
)
from kvjax.request import SamplingParams
from tests.decode.naive_sampling import distribution, edited

step = jax.jit(sample)
GREEDY = SamplingParams(temperature=0)


def request(params, row=0, **rest):
    return RowRequest(row, params, **{"seed": 1000 + row, "position": 10 + row, **rest})


# -- greedy ---------------------------------------------------------------------------------------


def test_greedy_takes_the_lowest_index_of_a_tie_and_a_nan_wins():
    x = np.asarray([[1, 3, 3, 0], [-np.inf, -1, -2, -1], [9, np.nan, 1, 2]], np.float32)
    assert np.asarray(row_argmax(x)).tolist() == [1, 1, 1]


def test_a_greedy_row_is_greedy_whatever_its_batch_mates_do():
    logits = np.random.default_rng(0).standard_normal((6, 50)).astype(np.float32)
    wild = SamplingParams(temperature=2.0, top_p=0.9, top_k=7, min_p=0.01, seed=1)
    params = [GREEDY, wild, SamplingParams(temperature=1e-6, top_k=3), wild, GREEDY, wild]
    rows = pack_rows([request(p, row) for row, p in enumerate(params)], 6, 6)
    drawn = np.asarray(step(logits, DecodeState.allocate(6, 50), rows)[0])
    np.testing.assert_array_equal(drawn[[0, 2, 4]], logits.argmax(1)[[0, 2, 4]])


def test_a_row_with_nan_or_infinity_is_reported_and_harms_no_other():
    logits = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)
    clean = logits.copy()
    logits[1, 20], logits[2, 30] = np.nan, np.inf
    params = SamplingParams(top_p=0.8, top_k=20)
    rows = pack_rows([request(params, row) for row in range(4)], 4, 4)
    state = DecodeState.allocate(4, 50)
    tokens, _, out = step(logits, state, rows)
    assert np.asarray(out.healthy).tolist() == [True, False, False, True]
    expected = np.asarray(step(clean, state, rows)[0])
    np.testing.assert_array_equal(np.asarray(tokens)[[0, 3]], expected[[0, 3]])


# -- distribution ---------------------------------------------------------------------------------

VOCAB, DRAWS = 12, 16384
LOGITS = np.asarray([2.0, 1.5, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -2.5, -6.0], np.float32)


def draws(params, positions, branches=None, seeds=None):
    rows = pack_rows([], DRAWS, 0)
    filled = pack_rows([request(params)], 1, 0)
    names = ("temperature", "top_p", "top_k", "min_p")
    for name in names:
        getattr(rows, name)[:] = getattr(filled, name)[0]
    rows.seeds[:] = 7 if seeds is None else seeds
    rows.branches[:] = 0 if branches is None else branches
    rows.positions[:] = positions
    logits = np.broadcast_to(LOGITS, (DRAWS, VOCAB))
    draw = jax.jit(lambda *args: sample(*args))  # traced anew: a test may have planted a bug
    return np.asarray(draw(logits, DecodeState.allocate(0, VOCAB), rows)[0])


def surprise(tokens, probabilities):
    """Chi-square of the counts in standard deviations above its mean; infinite if impossible."""
    counts = np.bincount(tokens, minlength=VOCAB)
    if counts[probabilities == 0].any():
        return np.inf
    expected = probabilities[probabilities > 0] * len(tokens)
    freedom = len(expected) - 1
    chi = ((counts[probabilities > 0] - expected) ** 2 / expected).sum()
    return (chi - freedom) / np.sqrt(2 * freedom)


CASES = {
    "plain": SamplingParams(),
    "hot": SamplingParams(temperature=1.7),
    "cold": SamplingParams(temperature=0.5),
    "top_p": SamplingParams(top_p=0.8),
    "top_k with a tie": SamplingParams(top_k=2),
    "min_p": SamplingParams(min_p=0.2),
    "all": SamplingParams(temperature=1.3, top_p=0.9, top_k=8, min_p=0.05),
}
EVERY = np.arange(DRAWS)


def expected_distribution(params):
    return distribution(edited(LOGITS, params, [], [], [], []), params)


@pytest.mark.parametrize("name", CASES)
def test_draws_over_positions_follow_the_distribution(name):
    assert surprise(draws(CASES[name], EVERY), expected_distribution(CASES[name])) < 5


def test_draws_over_branches_and_over_seeds_follow_the_distribution():
    target = expected_distribution(CASES["all"])
    assert surprise(draws(CASES["all"], 3, branches=EVERY), target) < 5
    assert surprise(draws(CASES["all"], 3, seeds=EVERY), target) < 5


def without_position(monkeypatch):
    keys = sampling.request_keys
    monkeypatch.setattr(sampling, "request_keys", lambda s, h, b, p, u: keys(s, h, b, p * 0, u))


def one_noise_for_two_positions(monkeypatch):
    keys = sampling.request_keys
    monkeypatch.setattr(sampling, "request_keys", lambda s, h, b, p, u: keys(s, h, b, p // 2, u))


def noise_upside_down(monkeypatch):
    noise = sampling.gumbel_noise
    monkeypatch.setattr(sampling, "gumbel_noise", lambda keys, size: -noise(keys, size))


def noise_a_tenth_too_weak(monkeypatch):
    noise = sampling.gumbel_noise
    monkeypatch.setattr(sampling, "gumbel_noise", lambda keys, size: 0.9 * noise(keys, size))


def forgotten_filters(monkeypatch):
    monkeypatch.setattr(sampling, "process_logits", lambda raw, state, rows, stages: raw)


@pytest.mark.parametrize(
    "bug", [without_position, noise_upside_down, noise_a_tenth_too_weak, forgotten_filters]
)
def test_the_distribution_test_finds_planted_bugs(monkeypatch, bug):
    bug(monkeypatch)
    assert surprise(draws(CASES["all"], EVERY), expected_distribution(CASES["all"])) > 10


def repeats(tokens):
    """How often consecutive draws are equal, in standard deviations above independence."""
    share = (tokens[::2] == tokens[1::2]).mean()
    chance = (expected_distribution(CASES["plain"]) ** 2).sum()
    return (share - chance) / np.sqrt(chance * (1 - chance) / (DRAWS // 2))


def test_consecutive_draws_are_independent_and_the_test_would_notice(monkeypatch):
    assert abs(repeats(draws(CASES["plain"], EVERY))) < 5
    one_noise_for_two_positions(monkeypatch)
    assert repeats(draws(CASES["plain"], EVERY)) > 10


# -- independence of batch mates ------------------------------------------------------------------


def mixed_requests(vocab):
    """Sixteen requests that use everything in turn, their seats loaded."""
    rng = np.random.default_rng(vocab)
    state, requests = DecodeState.allocate(16, vocab), []
    for row in range(16):
        params = SamplingParams(
            temperature=[0.0, 1.0, 0.7, 1.9][row % 4],
            top_p=[1.0, 0.9, 0.5][row % 3],
            top_k=[0, 40, 3, 0, 0][row % 5],
            min_p=[0.0, 0.0, 0.02][(row // 2) % 3],
            repetition_penalty=1.2 if row % 6 == 1 else 1.0,
            frequency_penalty=0.3 if row % 7 == 2 else 0.0,
            logit_bias={row: 1.5} if row % 8 == 3 else None,
            logprobs=5 if row % 2 else None,
            bad_words=["x"] if row == 9 else None,
            min_tokens=3 if row % 5 == 0 else 0,
        )
        if params.needs_seat_features:
            prompt, output = rng.integers(0, vocab, (2, 20)).tolist()
            state = load_seat(
                state, row, seat_features(params, vocab, prompt, output, [[output[-1], 4]])
            )
        requests.append(request(params, row, end_token_ids=(0, 1), branch=row % 3))
    return state, requests


@pytest.mark.parametrize("vocab", [1003, 5000])
def test_every_result_of_a_row_is_bit_equal_in_every_batch(vocab):
    state, requests = mixed_requests(vocab)
    logits = np.random.default_rng(1).standard_normal((16, vocab)).astype(np.float32) * 3
    whole = jax.tree.map(np.asarray, step(logits, state, pack_rows(requests, 16, 16))[2])
    for size in (1, 2, 7, 8):
        order = np.random.default_rng(size).permutation(16)
        for start in range(0, 16 - size + 1, size):
            batch = order[start : start + size]
            rows = pack_rows([requests[row] for row in batch], size, 16)
            alone = jax.tree.map(np.asarray, step(logits[batch], state, rows)[2])
            expected = jax.tree.map(lambda leaf, batch=batch: leaf[batch], whole)
            jax.tree.map(np.testing.assert_array_equal, alone, expected)


def test_padding_changes_nothing():
    state, requests = mixed_requests(200)
    logits = np.random.default_rng(1).standard_normal((16, 200)).astype(np.float32)
    full = step(logits[:8], state, pack_rows(requests[:8], 8, 16))
    logits[8:] = np.nan
    padded = step(logits, state, pack_rows(requests[:8], 16, 16))
    for mine, expected in zip(jax.tree.leaves(padded[2]), jax.tree.leaves(full[2]), strict=True):
        np.testing.assert_array_equal(mine[:8], expected)
    for mine, expected in zip(jax.tree.leaves(padded[1]), jax.tree.leaves(full[1]), strict=True):
        np.testing.assert_array_equal(mine, expected)


# -- log-probabilities ----------------------------------------------------------------------------


def test_logprobs_ranks_and_top_tokens_are_those_of_the_raw_logits():
    state, requests = mixed_requests(300)
    logits = np.random.default_rng(2).standard_normal((16, 300)).astype(np.float32) * 3
    logits[1, 40:60] = logits[1].max()  # ties
    rows = pack_rows(requests, 16, 16)
    out = jax.tree.map(np.asarray, step(logits, state, rows)[2])
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    for row in range(16):
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
    rows = pack_rows(
        [request(GREEDY, 0, forced_token=4, active=False, want_logprobs=True)], 2, 2
    )
    _, state, out = step(logits, DecodeState.allocate(2, 9), rows)
    exact = logits[0] - np.log(np.exp(logits[0].astype(np.float64)).sum())
    assert out.tokens[0] == 4
    assert out.logprobs[0] == pytest.approx(exact[4], abs=1e-5)
    assert np.asarray(out.top_ids)[0, 9:].tolist() == [-1] * 11  # nine tokens only
    assert np.asarray(state.last_tokens).tolist() == [0, 0, 0]


def test_logits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"expected logits \[2, 9\], got \(2, 8\)"):
        sample(np.zeros((2, 8), np.float32), DecodeState.allocate(1, 9), pack_rows([], 2, 1))


def test_bfloat16_logits_are_sampled_in_float32():
    x = jax.numpy.asarray(np.random.default_rng(0).standard_normal((1, 40)), jax.numpy.bfloat16)
    rows = pack_rows([request(SamplingParams(top_p=0.9, logprobs=1))], 1, 1)
    state = DecodeState.allocate(1, 40)
    mine = step(x, state, rows)[2]
    expected = step(x.astype(np.float32), state, rows)[2]
    jax.tree.map(np.testing.assert_array_equal, mine, expected)
