"""Draws follow the distribution of the formulas; the tests notice planted bugs."""

import jax
import numpy as np
import pytest

from kvjax.decode import LOGIT_STAGES, DecodeState, RowRequest, pack_rows, sample, sampling
from kvjax.request import SamplingParams
from tests.decode.naive_sampling import distribution, edited

VOCAB, DRAWS = 12, 16384
LOGITS = np.asarray([2.0, 1.5, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -2.5, -6.0], np.float32)


step = jax.jit(sample)


def draws(params, positions, branches=None, seeds=None, draw=step):
    rows = pack_rows([], DRAWS, 0)
    filled = pack_rows([RowRequest(0, params, seed=0, position=0)], 1, 0)
    names = ("temperature", "top_p", "top_k", "min_p")
    for name in names:
        getattr(rows, name)[:] = getattr(filled, name)[0]
    rows.seeds[:] = 7 if seeds is None else seeds
    rows.branches[:] = 0 if branches is None else branches
    rows.positions[:] = positions
    logits = np.broadcast_to(LOGITS, (DRAWS, VOCAB))
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


def buggy_draws(params):
    """The same, traced anew so that a planted bug is in it, and without filters to be quick."""
    stages = [stage for stage in LOGIT_STAGES if stage.name == "temperature"]
    return draws(params, EVERY, draw=jax.jit(lambda *args: sample(*args, stages=stages)))


def without_position(monkeypatch):
    keys = sampling.request_keys
    monkeypatch.setattr(sampling, "request_keys", lambda s, h, b, p, u: keys(s, h, b, p * 0, u))


def one_noise_for_two_positions(monkeypatch):
    keys = sampling.request_keys
    monkeypatch.setattr(sampling, "request_keys", lambda s, h, b, p, u: keys(s, h, b, p // 2, u))


def noise_a_tenth_too_weak(monkeypatch):
    noise = sampling.gumbel_noise
    monkeypatch.setattr(sampling, "gumbel_noise", lambda keys, size: 0.9 * noise(keys, size))


def forgotten_temperature(monkeypatch):
    monkeypatch.setattr(sampling, "process_logits", lambda raw, state, rows, stages: raw)


def no_bug(monkeypatch):
    del monkeypatch


@pytest.mark.parametrize(
    "bug", [no_bug, without_position, noise_a_tenth_too_weak, forgotten_temperature]
)
def test_the_distribution_test_finds_planted_bugs(monkeypatch, bug):
    bug(monkeypatch)
    params = CASES["hot"]
    found = surprise(buggy_draws(params), expected_distribution(params))
    assert found < 5 if bug is no_bug else found > 10


def repeats(tokens):
    """How often consecutive draws are equal, in standard deviations above independence."""
    share = (tokens[::2] == tokens[1::2]).mean()
    chance = (expected_distribution(CASES["plain"]) ** 2).sum()
    return (share - chance) / np.sqrt(chance * (1 - chance) / (DRAWS // 2))


def test_consecutive_draws_are_independent_and_the_test_would_notice(monkeypatch):
    assert abs(repeats(draws(CASES["plain"], EVERY))) < 5
    one_noise_for_two_positions(monkeypatch)
    assert repeats(buggy_draws(CASES["plain"])) > 10
