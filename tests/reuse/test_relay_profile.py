"""The layer range of RelayCaching: where values deviate, and where that can be told early."""

import numpy as np
import pytest

from kvjax import LLM, SamplingParams
from kvjax.relay_profile import angles, deviations, layer_range, profile
from kvjax.reuse import parse
from kvjax.reuse.relaycaching import RelayCaching
from tests.tiny_model import tiny

GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
TOKENS = np.array([1.0, 2.0, 3.0, 6.0])  # who deviates how much, where it can be told
OTHERS = np.array([3.0, 1.0, 6.0, 2.0])


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny(LLM, fresh=True, num_pages=64, max_model_len=128)


def u_shaped() -> np.ndarray:
    """Six layers: two shallow ones, three in the middle of which the first tells nothing, a deep
    one."""
    return np.stack([0 * TOKENS, 0.1 * TOKENS, OTHERS, TOKENS, 1.5 * TOKENS, 0.2 * TOKENS])


def test_the_range_is_where_values_deviate_and_is_told_in_its_first_layer_that_foretells():
    found = layer_range([u_shaped()])
    assert (found.start, found.detect, found.end) == (2, 4, 5)  # layer 3 foretells layer 4
    np.testing.assert_allclose(found.deviation, [0, 0.3, 3, 3, 4.5, 0.6])
    assert found.spec == "relaycaching:start=2,detect=4,end=5"
    assert parse(found.spec) == RelayCaching(start=2, detect=4, end=5)


def test_a_wider_share_and_a_lower_demand_begin_earlier():
    found = layer_range([u_shaped()], share=0.1, foretells=-1)
    assert (found.start, found.detect, found.end) == (2, 3, 6)


def test_where_nothing_foretells_enough_the_best_layer_is_taken():
    deviating = np.stack([OTHERS, TOKENS + OTHERS, TOKENS])
    found = layer_range([deviating], share=0, foretells=1.01)
    assert (found.start, found.detect, found.end) == (0, 2, 3)


def test_a_single_layer_is_a_range():
    found = layer_range([np.stack([0 * TOKENS, TOKENS, 0 * TOKENS])])
    assert (found.start, found.detect, found.end) == (1, 2, 2)
    assert parse(found.spec)


def test_texts_count_by_their_tokens():
    found = layer_range([np.ones((2, 1)), np.array([[0.0, 0, 0], [4, 4, 4]])])
    assert found.deviation == (0.25, 3.25)


@pytest.mark.parametrize("found", [[], [np.zeros((3, 4))]])
def test_what_shows_nothing_is_refused(found):
    with pytest.raises(ValueError, match=r"at least one text|nothing deviates"):
        layer_range(found)


def test_angles_are_one_minus_the_cosine():
    one = np.array([[[[1.0, 0.0]], [[2.0, 0.0]], [[0.0, 0.0]]]])
    other = np.array([[[[0.0, 3.0]], [[5.0, 0.0]], [[1.0, 0.0]]]])
    np.testing.assert_allclose(angles(one, other), [[1, 0, 1]])


def test_layer_0_does_not_deviate_and_nothing_does_behind_the_same_text(llm):
    found = deviations(llm, "thequickbrownfox", "answerfrom", GREEDY)
    assert found.shape == (2, 15)  # the last token's KV was not needed
    assert found[0].max() < 1e-5 < 1e-3 < found[1].max()
    same = deviations(llm, "thequickbrownfox", "thequickbrownfox", GREEDY)
    assert same.max() < 1e-5


def test_a_model_is_profiled_from_what_it_writes(llm):
    found = profile(llm, [("thequickbrownfox", "answerfrom"), ("packmybox", "say")], GREEDY)
    assert (found.start, found.detect, found.end) == (1, 2, 2)
    assert found.deviation[0] < 1e-5 < found.deviation[1]
