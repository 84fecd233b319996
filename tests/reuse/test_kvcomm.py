"""KVCOMM: its arithmetic on numbers made by hand, and offsets of earlier messages."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from kvjax import SamplingParams
from kvjax.cache.chunks import Variant, VariantKey, tokens_hash
from kvjax.request import Chunk
from kvjax.reuse import KVComm, parse
from kvjax.reuse.anchors import (
    Age,
    gate_weights,
    interpolated,
    leaves,
    predictable,
    softmax,
    token_weights,
    top_p,
)
from kvjax.reuse.kvcomm import placeholder
from kvjax.reuse.strategy import ModelFacts, Prompt, Segment
from tests.reuse.prompts import (
    QUESTION,
    SYSTEM,
    answer,
    assert_exact_behind_a_prefix,
    distance,
    fresh_llm,
    full_prefill,
    prompts,
)

DENSE = KVComm(gamma=0.0)  # nothing speaks for anything
SURE = KVComm(gamma=1.0, temperature=1e-4)  # two anchors speak for all; the nearest one alone
MESSAGES = ("one and two make 3. ", "two and two make 4. ", "six and one make 7. ")
OTHER = "ten and six make 16."  # as long


def test_weights_are_softmax_of_minus_the_distance():
    np.testing.assert_allclose(softmax(np.array([0.0, math.log(2), math.log(4)])),
                               [4 / 7, 2 / 7, 1 / 7])  # fmt: skip
    far = gate_weights([1000.0, 1000.0 + math.log(3)])  # no overflow
    np.testing.assert_allclose(far, [0.75, 0.25])


@pytest.mark.parametrize(
    ("weights", "gamma", "speaks"),
    [
        ([0.5, 0.5], 1.0, True),  # entropy of 1 bit, of 1
        ([0.5, 0.5], 0.99, False),
        ([0.9, 0.1], 0.47, True),  # 0.469 bits
        ([0.9, 0.1], 0.46, False),
        ([0.5, 0.25, 0.125, 0.125], 0.875, True),  # 1.75 bits of 2
        ([0.5, 0.25, 0.125, 0.125], 0.87, False),
        ([1.0, 0.0], 0.01, True),
        ([1.0, 0.0], 0.0, False),
        ([1.0], 1.0, False),  # one anchor cannot be told from others
        ([], 1.0, False),
    ],
)
def test_a_message_is_spoken_for_if_the_entropy_of_its_weights_is_low(weights, gamma, speaks):
    assert predictable(np.array(weights), gamma) is speaks


def test_the_fewest_anchors_that_make_up_a_share_are_used():
    weights = np.array([0.2, 0.5, 0.05, 0.25])
    assert top_p(weights, 0.9).tolist() == [1, 3, 0]
    assert top_p(weights, 0.75).tolist() == [1, 3]
    assert top_p(weights, 0.0).tolist() == [1]
    assert sorted(top_p(weights, 1.0).tolist()) == [0, 1, 2, 3]


def kv(*tokens: float) -> np.ndarray:
    """KV of two layers, one head and two channels, equal over all of them."""
    return np.broadcast_to(
        np.array(tokens, np.float32)[None, :, None, None], (2, len(tokens), 1, 2)
    )


def test_each_token_has_weights_of_its_own():
    weights = token_weights(kv(0, 1), [kv(0, 3, 9), kv(math.log(3), 3)], 1.0)
    np.testing.assert_allclose(weights, [[0.75, 0.5], [0.25, 0.5]], rtol=1e-6)
    cold = token_weights(kv(0, 1), [kv(0, 3), kv(1, 2)], 1e-3)
    np.testing.assert_allclose(cold, [[1, 0], [0, 1]], atol=1e-6)


def test_offsets_are_weighted_token_by_token_and_layer_0_has_none():
    weights = np.array([[0.75, 0.5], [0.25, 0.5]])
    offset = interpolated(weights, [kv(4, 2, 7), kv(-4, 4)])
    np.testing.assert_array_equal(offset[0], 0)
    np.testing.assert_allclose(offset[1, :, 0, 0], [2, 3])


def test_one_identical_anchor_gives_its_own_offset():
    weights = token_weights(kv(5, 6), [kv(5, 6)], 1.0)
    np.testing.assert_allclose(interpolated(weights, [kv(1, 2)])[1, :, 0, 1], [1, 2])


def test_the_least_used_of_the_oldest_leaves():
    ages = [Age(7, 0), Age(1, 3), Age(2, 1), Age(4, 1), Age(3, 2), Age(5, 9)]
    assert leaves(ages, 5) == 2  # 1, 2, 3, 4, 5 came first; two have 1 use
    assert leaves(ages, 1) == 1
    assert leaves(ages, 6) == 0


def test_a_placeholder_is_known_by_the_fixed_text_in_front():
    def prompt(*parts: str) -> Prompt:
        """Texts and chunks in turn."""
        segments, text = [], ""
        for at, part in enumerate(parts):
            if at % 2:
                tokens = tuple(map(ord, part))
                segments.append(Segment(len(text), len(text) + len(part), tokens_hash(tokens)))
            text += part
        tokens = tuple(map(ord, text))
        return Prompt(tokens, tuple(segments), None, ModelFacts(2, 64, 2048, 512))

    one = prompt("agent: ", "message", " and ", "another", "?")
    assert placeholder(one, 1) == placeholder(prompt("agent: ", "m", " and ", "n", "!!"), 1)
    others = [
        placeholder(one, 0),
        placeholder(prompt("other: ", "message", " and ", "another"), 1),
        placeholder(prompt("agent: ", "message", " or ", "another"), 1),
        placeholder(prompt("agent: ", "message", "", "another"), 1),
    ]
    assert len({placeholder(one, 1), *others}) == 5


@pytest.mark.parametrize("name", prompts())
def test_computing_what_nothing_speaks_for_is_full_prefill(name):
    llm = fresh_llm()
    wanted = full_prefill(llm, prompts()[name])
    for _ in range(2):
        assert distance(answer(llm, prompts()[name], DENSE), wanted) <= 1e-4
        llm.reset_prefix_cache()
    llm.engine.check_integrity()


def test_exact_prefixes_and_chunks_compose():
    assert_exact_behind_a_prefix(DENSE)


def ask(llm: Any, message: str, strategy: Any = SURE, agent: str = SYSTEM, **options: Any) -> Any:
    llm.reset_prefix_cache()
    out = answer(llm, [agent, Chunk(message), QUESTION], strategy, **options)
    llm.engine.check_integrity()
    return out


def test_a_message_that_was_an_anchor_itself_is_corrected_exactly():
    llm = fresh_llm()
    for message in MESSAGES[:2]:
        assert ask(llm, message).reuse.patched == 0  # computed, and an anchor from now on
    for message in MESSAGES[:2]:
        wanted = full_prefill(llm, [SYSTEM, Chunk(message), QUESTION])
        out = ask(llm, message)
        assert out.reuse.patched == len(message)
        assert out.reuse.computed == len(SYSTEM + QUESTION)
        assert distance(out, wanted) <= 1e-4
        assert distance(ask(llm, message, "naive"), wanted) > 1e-4  # else this shows nothing


ARRANGEMENTS = {
    "twice": lambda m: [SYSTEM, Chunk(m), Chunk(m), QUESTION],
    "text between": lambda m: [SYSTEM, Chunk(m), " and ", Chunk(m[:5]), QUESTION],
    "one token": lambda m: [SYSTEM, Chunk(m[0]), Chunk(m), QUESTION],
    "order": lambda m: [SYSTEM, Chunk(m), Chunk(m[0]), QUESTION],
    "no question": lambda m: [SYSTEM, Chunk(m)],
    "first": lambda m: [Chunk(m), Chunk(m[:7]), QUESTION],
}


@pytest.mark.parametrize("arrange", ARRANGEMENTS.values(), ids=ARRANGEMENTS.keys())
def test_what_was_computed_in_an_arrangement_is_corrected_exactly_in_it(arrange):
    llm = fresh_llm()
    for message in MESSAGES[:2]:
        answer(llm, arrange(message), SURE)
        llm.reset_prefix_cache()
    for message in MESSAGES[:2]:
        wanted = full_prefill(llm, arrange(message))
        out = answer(llm, arrange(message), SURE)
        assert out.reuse.patched > 0
        assert distance(out, wanted) <= 1e-4
        llm.engine.check_integrity()


def test_exact_corrections_behind_an_exact_prefix_that_ends_in_the_chunk():
    llm = fresh_llm()
    for message in MESSAGES[:2]:
        ask(llm, message)
    prompt = [SYSTEM, Chunk(MESSAGES[0]), QUESTION]
    wanted = full_prefill(llm, prompt)
    answer(llm, SYSTEM + MESSAGES[0][:7])
    out = answer(llm, prompt, SURE)
    assert out.reuse.exact == len(SYSTEM) + 7
    assert out.reuse.patched == len(MESSAGES[0]) - 7
    assert distance(out, wanted) <= 1e-4


def test_a_new_message_is_corrected_by_others_and_not_exact():
    llm = fresh_llm()
    for message in MESSAGES:
        ask(llm, message, KVComm(gamma=1.0))
    wanted = full_prefill(llm, [SYSTEM, Chunk(OTHER), QUESTION])
    out = ask(llm, OTHER, KVComm(gamma=1.0))
    assert out.reuse.patched == len(OTHER)
    assert distance(out, wanted) > 1e-4


def pool(llm: Any, agent: str = SYSTEM, salt: str | None = None) -> dict[str, Age]:
    """Anchors of one place, by message."""
    name = tokens_hash(map(ord, agent))
    return {
        "".join(map(chr, v.tokens)): v.facts["kvcomm"][name]
        for v in llm.engine.chunks.store.of(salt)
        if name in v.facts.get("kvcomm", {})
    }


def test_a_pool_is_bounded_and_what_left_it_takes_no_memory():
    llm, few = fresh_llm(), KVComm(gamma=0.0, anchors=2, window=1)
    for message in MESSAGES:
        ask(llm, message, few)
    assert list(pool(llm)) == list(MESSAGES[1:])
    for variant in llm.engine.chunks.store:
        text = "".join(map(chr, variant.tokens))
        assert len(variant.arrays) == (2 if text == MESSAGES[0] else 4)


def test_uses_are_counted_and_protect_an_anchor():
    llm = fresh_llm()
    for message in MESSAGES[:2]:
        ask(llm, message)
    ask(llm, MESSAGES[0])
    assert [age.uses for age in pool(llm).values()] == [1, 0]
    ask(llm, MESSAGES[2], dataclasses.replace(SURE, gamma=0.0, anchors=2, window=2))
    assert list(pool(llm)) == [MESSAGES[0], MESSAGES[2]]


def test_a_message_is_an_anchor_of_few_agents_at_once():
    llm = fresh_llm()
    for agent in ("a: ", "b: ", "c: "):
        ask(llm, MESSAGES[0], KVComm(pools=2), agent)
    assert [len(pool(llm, agent)) for agent in ("a: ", "b: ", "c: ")] == [0, 1, 1]


def test_anchors_may_come_from_a_file_as_plain_values():
    llm, few = fresh_llm(), KVComm(gamma=1.0, anchors=2, window=2)
    for message in MESSAGES[:2]:
        ask(llm, message, few)
    for variant in llm.engine.chunks.store:
        ages = variant.facts["kvcomm"].items()
        variant.facts["kvcomm"] = {place: tuple(age) for place, age in ages}
    assert ask(llm, MESSAGES[0], few).reuse.patched == len(MESSAGES[0])
    ask(llm, MESSAGES[2], dataclasses.replace(few, gamma=0.0))
    assert MESSAGES[2] in pool(llm)
    assert len(pool(llm)) == 2


def test_agents_and_tenants_have_pools_of_their_own():
    llm = fresh_llm()
    for message in MESSAGES[:2]:
        ask(llm, message)
    assert ask(llm, MESSAGES[0], agent="other agent: ").reuse.patched == 0
    params = SamplingParams(max_tokens=1, reuse=SURE, cache_salt="b")
    (out,) = llm.generate([[SYSTEM, Chunk(MESSAGES[0]), QUESTION]], params)
    assert out.reuse.patched == 0
    assert set(pool(llm)) == set(MESSAGES[:2])
    assert set(pool(llm, salt="b")) == {MESSAGES[0]}


def test_anchors_that_are_shorter_do_not_speak():
    llm = fresh_llm()
    for message in MESSAGES[:2]:
        ask(llm, message)
    assert ask(llm, OTHER[:9]).reuse.patched == 9
    assert ask(llm, OTHER + "that is all").reuse.patched == 0
    assert ask(llm, MESSAGES[2] + "in all").reuse.patched == 0  # one is long enough, of three


def test_one_message_that_nothing_speaks_for_has_the_prompt_computed():
    llm = fresh_llm()
    for message in MESSAGES[:2]:
        answer(llm, [SYSTEM, Chunk(message), " so ", Chunk("x"), QUESTION], SURE)
        llm.reset_prefix_cache()
    prompt = [SYSTEM, Chunk(MESSAGES[0]), " so ", Chunk("longer"), QUESTION]
    wanted = full_prefill(llm, prompt)
    out = answer(llm, prompt, SURE)
    assert out.reuse.patched == 0
    assert distance(out, wanted) <= 1e-4


def test_anchors_leave_with_their_chunk():
    llm = fresh_llm()
    for message in MESSAGES[:2]:
        ask(llm, message)
    variant = llm.engine.chunks.store.get(VariantKey(None, tokens_hash(map(ord, MESSAGES[0])), ""))
    llm.engine.chunks.store.discard(variant)
    out = ask(llm, MESSAGES[0])
    assert out.reuse.patched == 0
    assert set(pool(llm)) == set(MESSAGES[:2])  # computed, and an anchor again


def test_asking_exactly_after_a_correction_is_a_cold_full_prefill():
    llm = fresh_llm()
    for message in MESSAGES:
        ask(llm, message)
    prompt = [SYSTEM, Chunk(OTHER), QUESTION]
    wanted = full_prefill(llm, prompt)
    assert answer(llm, prompt, SURE).reuse.patched > 0
    out = answer(llm, prompt)
    assert out.num_cached_tokens <= len(SYSTEM)
    assert distance(out, wanted) == 0


def test_the_same_correction_again_is_found_until_the_anchors_change():
    llm = fresh_llm()
    for message in MESSAGES[:2]:
        ask(llm, message)
    prompt = [SYSTEM, Chunk(OTHER), QUESTION]
    first, second = answer(llm, prompt, SURE), answer(llm, prompt, SURE)
    assert second.reuse.run_layer_tokens == 2  # the last token
    assert distance(first, second) == 0
    answer(llm, [SYSTEM, Chunk(MESSAGES[2]), QUESTION], SURE, learn=True)  # a third anchor
    assert set(pool(llm)) == set(MESSAGES[:2])  # it was spoken for
    answer(llm, [SYSTEM, Chunk(MESSAGES[2]), QUESTION], DENSE)
    assert set(pool(llm)) == set(MESSAGES)
    assert answer(llm, prompt, SURE).reuse.run_layer_tokens > 2


def test_a_latent_has_keys_alone():
    strategy = KVComm()
    held = Variant(VariantKey(None, "c", ""), np.arange(2), 0, [], 0)
    strategy.annotate(held, lambda: (kv(1, 2), None))
    assert set(held.arrays) == {"kvcomm:k"}
    assert strategy._offset(held, [], "p", "v") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [("anchors=0", "anchors must be an integer of at least 1"), ("gamma=1.5", r"in \[0, 1\]"),
     ("window=0", "window must be"), ("top_p=-1", "top_p must be"), ("pools=0", "pools must be"),
     ("temperature=0", "temperature must be a number above 0"), ("depth=1", "it has")],
)  # fmt: skip
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        parse(f"kvcomm:{options}")


def test_its_spec_is_read():
    assert parse("kvcomm:anchors=5,gamma=0.5") == KVComm(anchors=5, gamma=0.5)
    assert parse(SURE.spec) == SURE
