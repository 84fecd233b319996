"""Cache-Craft: its arithmetic on numbers made by hand, and variants kept from real prompts."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.cache.chunks import Variant, VariantKey, tokens_hash
from kvjax.request import Chunk
from kvjax.reuse import CacheCraft, parse
from kvjax.reuse.cachecraft import eviction_order
from kvjax.reuse.impact import (
    Context,
    budget,
    budget_within,
    disorder,
    named,
    overhead,
    overlap,
)
from kvjax.reuse.plan import Spans, Stage, StagedPlan, TopK
from kvjax.reuse.report import Fate
from kvjax.reuse.scores import SCORES
from kvjax.reuse.strategy import Hit, ModelFacts, Prompt, Segment
from tests.reuse.prompts import (
    FIRST,
    QUESTION,
    SECOND,
    SYSTEM,
    THIRD,
    answer,
    assert_exact_behind_a_prefix,
    distance,
    fresh_llm,
    full_prefill,
    prompts,
)
from tests.reuse.test_attention_scores import HEADS, TOKENS, layer

# A chunk of 2 tokens behind a system text "s" of 2 and a chunk "a" of 4, in two layers.
OLD = Context(
    pieces=("s", "a"),
    lengths=(2, 4),
    inter=np.array([[1, 2], [3, 4]], np.float32),
    intra=np.array([4, 1], np.float32),
    num_tokens=2,
)
IMPACT = 1 / (1 + math.exp(-1.4))  # a: (1/4 + 2/8 + 3/4 + 4/8) / 2 = 0.875; b: (4/4 + 1/4) / 2


def test_context_impact_is_the_sigmoid_of_attention_in_front_over_attention_within():
    assert pytest.approx(IMPACT) == OLD.impact
    alone = Context((), (), np.zeros((2, 0), np.float32), np.ones(2, np.float32), 3)
    assert alone.impact == 0.5


@pytest.mark.parametrize(
    ("new", "share"),
    [(("s", "a"), 1), (("a",), 0.6), (("x", "s"), 0.4), ((), 0), (("x",), 0), (("a", "x", "s"), 1)],
)
def test_overlap_is_the_share_of_old_attention_to_what_is_there_again(new, share):
    assert overlap(OLD, new) == pytest.approx(share)


def test_what_was_alone_lacks_all_of_a_context():
    alone = Context((), (), np.zeros((2, 0), np.float32), np.ones(2, np.float32), 3)
    assert overlap(alone, ("s",)) == 0
    assert overhead(alone, ("s",)) == 0.5
    assert overhead(alone, ()) == 0


@pytest.mark.parametrize(
    ("old", "new", "swapped"),
    [("abcd", "abcd", 0), ("abcd", "dcba", 1), ("abcd", "bacd", 1 / 6), ("abcd", "axxcxb", 1 / 3),
     ("ab", "bx", 0), ("", "ab", 0)],
)  # fmt: skip
def test_disorder_is_the_share_of_common_pairs_that_changed_places(old, new, swapped):
    assert disorder(old, new) == pytest.approx(swapped)


@pytest.mark.parametrize(
    ("new", "share"),
    [(("s", "a"), 0), (("s", "x", "a"), 0), (("a", "s"), 1), (("a",), 0.4), (("x",), 1)],
)
def test_overhead_is_impact_times_what_is_lost(new, share):
    assert overhead(OLD, new) == pytest.approx(IMPACT * share)


def test_repeated_pieces_are_told_apart():
    assert named(["a", "b", "a", "a"]) == ("a", "b", "a#2", "a#3")


def test_each_chunk_runs_its_share_rounded_up():
    assert budget([0.5, 0.1, 0, 1], [5, 10, 7, 3]) == [3, 1, 0, 3]


def test_a_budget_is_spread_by_overhead_until_a_chunk_is_whole():
    assert budget_within([0.4, 0.1, 0], [10, 10, 7], 5) == [4, 1, 0]
    assert budget_within([0.8, 0.1, 0], [5, 10, 7], 8) == [5, 3, 0]
    assert budget_within([0.8, 0.1, 0], [5, 10, 7], 20) == [5, 10, 0]


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 50)), min_size=1, max_size=6),
    st.floats(0, 1),
)
def test_a_budget_is_used_up_on_what_lost_something(chunks, ratio):
    costs, sizes = zip(*chunks, strict=True)
    most = int(ratio * sum(sizes))
    counts = budget_within(costs, sizes, most)
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    assert sum(counts) == min(most, sum(size for cost, size in chunks if cost > 0))


def test_question_attention_is_the_mean_over_the_keys_of_a_chunk():
    rows = [16, 17, 18]
    scores = np.asarray(SCORES["question_chunk_attention"](layer(rows)))
    wanted = np.zeros(TOKENS)
    wanted[2:6] = wanted[8:16] = HEADS * sum(1 / (row + 1) for row in rows)
    np.testing.assert_allclose(scores, wanted, rtol=1e-5)
    scores = np.asarray(SCORES["question_chunk_attention"](layer(rows, favourite=4)))
    wanted[2:6], wanted[8:16] = HEADS * len(rows) / 4, 0
    np.testing.assert_allclose(scores, wanted, rtol=1e-5, atol=1e-5)


def variant(tokens: int, context: Context, scores: Any) -> Variant:
    held = Variant(VariantKey(None, "", "x"), np.arange(tokens), 3, [], 0, context_ids=(1, 2, 3))
    held.facts["cachecraft"] = context
    held.scores["cachecraft"] = np.asarray(scores, np.float32)
    return held


def hits_and_prompt() -> tuple[list[Hit], Prompt]:
    """Two chunks of 4 tokens behind text, which was in front of neither when they were kept."""
    segments = (Segment(5, 9, "b"), Segment(9, 13, "c"))
    old = OLD._replace(num_tokens=4)
    hits = [
        Hit(0, segments[0], variant(4, old, [1, 3, 2, 0]), 5, 9),
        Hit(1, segments[1], variant(4, old, [0, 1, 2, 3]), 9, 13),
    ]
    return hits, Prompt(tuple(range(20)), segments, None, ModelFacts(10, 64, 2048, 512))


def test_the_tokens_with_the_most_attention_in_front_run_again():
    hits, prompt = hits_and_prompt()
    assert CacheCraft(ratio=0.5, focus=1).select(prompt, hits) == Spans(((6, 8), (11, 13)))
    assert CacheCraft(ratio=1).select(prompt, hits) == Spans(((5, 13),))
    behind_a_prefix = [dataclasses.replace(hits[0], start=7)]  # tokens 2 and 3 are left
    assert CacheCraft(ratio=0.5, focus=1).select(prompt, behind_a_prefix) == Spans(((7, 8),))


def test_after_some_layers_only_focused_chunks_go_on():
    hits, prompt = hits_and_prompt()
    go_on = TopK("question_chunk_attention", 4, 1.0, layers="sum")
    rows = Spans(((0, 5), (6, 8), (11, 19)))
    plan = StagedPlan((Stage(0, 4, rows), Stage(4, 10, go_on)))
    assert CacheCraft(ratio=0.5).select(prompt, hits) == plan


def test_variants_leave_in_the_order_of_what_they_saved():
    held = [variant(4, OLD, [0] * 4) for _ in range(4)]
    for one, (uses, saving, last) in zip(
        held, [(4, 0.5, 9), (2, 0.9, 8), (3, 0.6, 2), (9, 1, 1)], strict=True
    ):
        one.uses, one.facts["saving"], one.last_use = uses, saving, last
    held[3].pins = 1
    assert eviction_order(held) == [held[2], held[1], held[0]]


@dataclasses.dataclass(frozen=True)
class Everything(CacheCraft):
    """Runs every row in both stages."""

    focused: float = 0.0

    def _rows(self, prompt: Prompt, hits: Any) -> list[np.ndarray]:
        return [np.arange(hit.start, hit.stop) for hit in hits]


@pytest.mark.parametrize("strategy", [CacheCraft(ratio=1.0), Everything()], ids=["known", "staged"])
def test_running_everything_again_is_full_prefill(strategy):
    """Each arrangement of chunks that were kept from the ones before, in one store."""
    llm, staged = fresh_llm(), 0
    for name, prompt in {**prompts(), **prompts()}.items():
        wanted = full_prefill(llm, prompt)
        out = answer(llm, prompt, strategy)
        assert distance(out, wanted) <= 1e-4, name
        staged += len(out.reuse.groups) > 1
        llm.engine.check_integrity()
    assert staged or strategy.ratio == 1


def test_partial_reuse_is_none_and_says_what_it_did():
    llm = fresh_llm()
    wanted = full_prefill(llm, prompts()["order"])
    for name in ("chunks", "order"):
        llm.reset_prefix_cache()
        out = answer(llm, prompts()[name], CacheCraft(focus=1))
    assert distance(out, wanted) > 1e-4  # else the gates above show nothing
    (group,) = out.reuse.groups
    assert group.computed == len(SYSTEM + THIRD + QUESTION)  # a chunk not seen before
    assert group.shifted + group.recomputed == len(FIRST + SECOND)
    assert group.recomputed > 0
    assert out.reuse.kept_layer_tokens == 2 * len(THIRD)


def test_exact_prefixes_and_chunks_compose():
    assert_exact_behind_a_prefix(CacheCraft(ratio=1.0))
    assert_exact_behind_a_prefix(Everything())


def test_the_same_prompt_is_exact_from_what_was_kept_of_it():
    llm = fresh_llm()
    prompt = prompts()["chunks"]
    wanted = full_prefill(llm, prompt)
    answer(llm, prompt, CacheCraft())
    llm.reset_prefix_cache()
    out = answer(llm, prompt, CacheCraft())
    assert distance(out, wanted) <= 1e-4
    assert out.reuse.exact == len(FIRST + SECOND)


def test_asking_exactly_after_a_blend_is_a_cold_full_prefill():
    llm = fresh_llm()
    prompt = [SYSTEM, Chunk(SECOND), Chunk(FIRST), QUESTION]
    wanted = full_prefill(llm, prompt)
    answer(llm, prompts()["chunks"], CacheCraft())
    blended = answer(llm, prompt, CacheCraft())
    assert blended.reuse.shifted > 0
    out = answer(llm, prompt)
    assert out.num_cached_tokens <= len(SYSTEM)  # no approximate page was hit
    assert distance(out, wanted) == 0


def kept(llm: Any, text: str, salt: str | None = None) -> list[Variant]:
    return list(llm.engine.chunks.store.variants(salt, tokens_hash(map(ord, text))).values())


def test_the_variant_whose_context_is_there_again_serves():
    llm = fresh_llm()
    for before in (FIRST, THIRD):
        prompt = ["In: ", Chunk(before), Chunk(SECOND), QUESTION]
        answer(llm, prompt, CacheCraft(), learn=True)
    behind_first, behind_third = kept(llm, SECOND)
    answer(llm, ["In: ", Chunk(THIRD), "! ", Chunk(SECOND), "why?"], CacheCraft())
    assert (behind_first.uses, behind_third.uses) == (0, 1)
    answer(llm, ["In: ", Chunk(FIRST), "! ", Chunk(SECOND), "why?"], CacheCraft())
    assert (behind_first.uses, behind_third.uses) == (1, 1)
    assert 0 < behind_first.facts["saving"] <= 1


def test_what_is_kept_may_come_from_a_file_as_plain_values():
    llm = fresh_llm()
    answer(llm, prompts()["chunks"], CacheCraft())
    wanted = answer(llm, prompts()["order"], CacheCraft(), learn=False)
    llm.reset_prefix_cache()
    for one in llm.engine.chunks.store:
        one.facts["cachecraft"] = tuple(one.facts["cachecraft"])
    assert distance(answer(llm, prompts()["order"], CacheCraft(), learn=False), wanted) == 0


def test_as_many_variants_are_kept_as_there_may_be():
    """Behind texts that share nothing a chunk is run again whole, and kept again."""
    llm = fresh_llm()
    for text in ("one: ", "two: ", "three: ", "four: "):
        answer(llm, [text, Chunk(FIRST), QUESTION], CacheCraft(alpha=2.0, variants=2))
    variants = kept(llm, FIRST)
    assert len(variants) == 2
    assert tuple(map(ord, "four: ")) in {v.context_ids for v in variants}
    llm.engine.check_integrity()


def test_chunks_put_ahead_of_time_serve_alone_and_the_first_tokens_run():
    llm = fresh_llm()
    assert llm.chunks.put([FIRST], strategy=CacheCraft())[0].stored
    out = answer(llm, [SYSTEM, Chunk(FIRST), QUESTION], CacheCraft())
    again = np.flatnonzero(out.reuse.fates[0] == Fate.RECOMPUTED)
    count = math.ceil(len(FIRST) / 2)
    assert again.tolist() == list(range(len(SYSTEM), len(SYSTEM) + count))


def test_what_others_stored_is_not_taken_and_no_tenant_sees_anothers():
    llm = fresh_llm()
    prompt = [SYSTEM, Chunk(FIRST), QUESTION]
    llm.chunks.put([FIRST], strategy="naive")
    assert answer(llm, prompt, CacheCraft()).reuse.shifted == 0
    llm.reset_prefix_cache()
    assert not kept(llm, FIRST, "a")
    assert len(kept(llm, FIRST)) == 2


def test_a_chunk_with_much_overhead_is_run_whole_and_kept():
    llm = fresh_llm()
    answer(llm, [SYSTEM, Chunk(FIRST), QUESTION], CacheCraft())
    other = ["In: ", Chunk(FIRST), QUESTION]
    assert answer(llm, other, CacheCraft()).reuse.shifted > 0
    assert len(kept(llm, FIRST)) == 1
    llm.reset_prefix_cache()
    assert answer(llm, other, CacheCraft(whole=0.5)).reuse.recomputed == len(FIRST)
    assert len(kept(llm, FIRST)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [("alpha=-1", "alpha must be a number of at least 0"), ("ratio=1.5", r"ratio .* in \[0, 1\]"),
     ("variants=0", "variants must be an integer of at least 1"), ("focus=2", r"in \[0, 1\]"),
     ("focused=inf", "focused must be"), ("ratio=x", "float"), ("depth=1", "it has")],
)  # fmt: skip
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        parse(f"cachecraft:{options}")


def test_its_spec_is_read():
    assert parse("cachecraft:ratio=0.15") == CacheCraft(ratio=0.15)
    assert parse("cachecraft").spec == "cachecraft"
