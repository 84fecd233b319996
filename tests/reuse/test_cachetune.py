"""CacheTune: scores by frequency, a ratio by link."""

import numpy as np
import pytest

from kvjax.request import Chunk
from kvjax.reuse import CacheTune, parse
from kvjax.reuse.cachetune import frequency_scores, low_passed
from kvjax.reuse.link import balanced_ratio, overlapped_seconds, searched_ratio
from kvjax.reuse.report import Fate
from kvjax.reuse.strategy import ModelFacts
from tests.reuse.prompts import (
    FIRST,
    QUESTION,
    SECOND,
    SYSTEM,
    answer,
    assert_exact,
    assert_exact_behind_a_prefix,
    fresh_llm,
    last_rows,
    prompts,
)

SMOLLM = ModelFacts(30, 576, 23_040, 34_560)


def wave(frequency, tokens=8):
    return np.cos(2 * np.pi * frequency * np.arange(tokens) / tokens).reshape(1, tokens, 1, 1)


def test_a_low_pass_keeps_slow_waves_and_drops_fast_ones():
    # 8 tokens have 5 frequencies, of which half is the first three.
    for frequency in (0, 1, 2):
        np.testing.assert_allclose(low_passed(wave(frequency), 0.5), wave(frequency), atol=1e-12)
    for frequency in (3, 4):
        np.testing.assert_allclose(low_passed(wave(frequency), 0.5), 0, atol=1e-12)
    mixed = 2 * wave(1) + wave(4)
    np.testing.assert_allclose(low_passed(mixed, 0.5), 2 * wave(1), atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 2, 7, 8])
def test_the_whole_band_changes_nothing(tokens):
    x = np.random.default_rng(0).normal(size=(2, tokens, 3, 4))
    np.testing.assert_allclose(low_passed(x, 1.0), x, atol=1e-12)
    assert low_passed(x, 1e-9).shape == x.shape


def test_a_score_is_half_the_sum_of_norms_over_heads_and_width_in_the_mean_over_layers():
    k = np.zeros((2, 4, 2, 2), np.float32)
    v = np.zeros((2, 4, 2, 2), np.float32)
    k[0, :, 0, 0], k[0, :, 1, 1] = 3, 4  # norm 5 in layer 0, at all tokens: only frequency 0
    v[0, :, 0, 0] = 1
    k[1, :, 0, 0] = 2
    np.testing.assert_allclose(frequency_scores(k, v, 0.5), [(3 + 1) / 2] * 4, rtol=1e-6)
    np.testing.assert_allclose(frequency_scores(k, None, 0.5), [(5 + 2) / 2] * 4, rtol=1e-6)


def test_loading_and_computing_end_together_at_the_balanced_ratio():
    ratio = balanced_ratio(3e-3, 1e-3, floor=0)
    assert ratio == pytest.approx(0.25)
    best = overlapped_seconds(ratio, 100, 3e-3, 1e-3, overhead=0.5)
    assert best == pytest.approx(0.575)
    for other in np.linspace(0, 1, 21):
        assert overlapped_seconds(other, 100, 3e-3, 1e-3, overhead=0.5) >= best - 1e-12


@pytest.mark.parametrize(
    ("megabytes", "ratio"),
    [(535, 0.03), (205, 0.07), (91, 0.15), (50, 0.24), (16, 0.50), (5, 0.76)],
)
def test_slower_links_have_more_computed_again(megabytes, ratio):
    strategy = CacheTune(ratio=0.0, link=megabytes * 1e6, prefill=700)
    assert strategy.ratio_for(SMOLLM) == pytest.approx(ratio, abs=0.006)
    floored = CacheTune(link=megabytes * 1e6, prefill=700)
    assert floored.ratio_for(SMOLLM) == pytest.approx(max(ratio, 0.15), abs=0.006)


@pytest.mark.parametrize("load", [0.2e-3, 1e-3, 5e-3])
def test_the_search_finds_the_minimum_of_the_model(load):
    calls = []

    def measure(ratio):
        calls.append(ratio)
        return overlapped_seconds(ratio, 100, 1e-3, load)

    found = searched_ratio(measure, calls=10)
    assert len(calls) == 10
    assert found == pytest.approx(balanced_ratio(1e-3, load), abs=0.85 * 0.618**9)


@pytest.mark.parametrize("name", prompts())
def test_running_everything_again_is_full_prefill(name):
    assert_exact(CacheTune(ratio=1.0), prompts()[name])


def test_exact_prefixes_and_chunks_compose():
    assert_exact_behind_a_prefix(CacheTune(ratio=1.0))


def test_the_best_of_each_chunk_run_again_also_behind_a_prefix_that_ends_within_one():
    llm, strategy = fresh_llm(), CacheTune(ratio=0.3)
    prompt = [SYSTEM, Chunk(FIRST), Chunk(SECOND), QUESTION]
    report = answer(llm, prompt, strategy).reuse
    wanted = []
    for text, start in ((FIRST, len(SYSTEM)), (SECOND, len(SYSTEM + FIRST))):
        (variant,) = [v for v in llm.engine.chunks.store if v.num_tokens == len(text)]
        order = np.argsort(-variant.scores["lowpass:0.5"], kind="stable")
        wanted += sorted(start + order[: int(0.3 * len(text))])
    np.testing.assert_array_equal(last_rows(report, Fate.RECOMPUTED), wanted)
    llm.reset_prefix_cache()
    answer(llm, SYSTEM + FIRST[:9])
    behind = last_rows(answer(llm, prompt, strategy).reuse, Fate.RECOMPUTED)
    np.testing.assert_array_equal(behind, [i for i in wanted if i >= len(SYSTEM) + 9])


def test_chunks_that_others_stored_are_scored_when_they_are_wanted():
    llm = fresh_llm()
    prompt = [SYSTEM, Chunk(FIRST), QUESTION]
    answer(llm, prompt, "naive")
    llm.reset_prefix_cache()
    report = answer(llm, prompt, CacheTune(ratio=0.5)).reuse
    assert len(last_rows(report, Fate.RECOMPUTED)) == len(FIRST) // 2


def test_options_are_validated():
    assert parse("cachetune:ratio=0.3,link=5e8,prefill=700") == CacheTune(0.3, 0.5, 5e8, 700.0)
    with pytest.raises(ValueError, match="band must be more than 0"):
        CacheTune(band=0)
    with pytest.raises(ValueError, match="link must be more than 0, got -1"):
        CacheTune(link=-1, prefill=1)
    with pytest.raises(ValueError, match="link and prefill go together"):
        CacheTune(link=5e8)
    with pytest.raises(ValueError, match="not both 0"):
        balanced_ratio(0, 0)
    with pytest.raises(ValueError, match="bounds must ascend"):
        searched_ratio(float, 0.5, 0.5)
    with pytest.raises(ValueError, match="calls must be at least 2"):
        searched_ratio(float, calls=1)
