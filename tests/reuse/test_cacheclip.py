"""CacheClip: a shared prefix, and windows of chosen tokens."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.request import Chunk
from kvjax.reuse import CacheClip, parse
from kvjax.reuse.plan import Spans, Stage, StagedPlan, TopK
from kvjax.reuse.report import Fate
from kvjax.reuse.strategy import Hit, ModelFacts, Prompt, Segment
from kvjax.reuse.windows import group_windows, most_grouped
from tests.reuse.prompts import (
    FIRST,
    QUESTION,
    SECOND,
    SYSTEM,
    THIRD,
    answer,
    assert_exact,
    assert_exact_behind_a_prefix,
    distance,
    fresh_llm,
    full_prefill,
    last_rows,
    prompts,
)


def grouped(chosen: str, size: int, least: int) -> str:
    flags = jnp.array([c == "x" for c in chosen])
    return "".join(".x"[int(f)] for f in group_windows(flags, size, least))


@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [
        ("x..x......x.", "............"),  # lonely ones are dropped
        ("....xxxxx........", ".xxxxxxxxxxx....."),  # every window that holds all five
        ("x.x.x.x.x.......", "................"),  # five in nine tokens are too few
        ("x.xx.x.x........", "xxxxxxxx........"),
        (".........xxxx..x", "........xxxxxxxx"),
        ("xxxxx", "xxxxx"),  # windows end with the prompt
        ("xxxx", "...."),
    ],
)
def test_windows_of_eight_with_five_chosen_tokens_are_whole(chosen, wanted):
    assert grouped(chosen, 8, 5) == wanted


def by_hand(chosen, size, least):
    n, out = len(chosen), [False] * len(chosen)
    for s in range(n):
        if sum(chosen[s : s + size]) >= least:
            out[s : s + size] = [True] * len(out[s : s + size])
    return out


@given(st.lists(st.booleans(), min_size=24, max_size=24), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_windows_are_their_definition_and_no_more_than_the_bound(chosen, size, least):
    least = min(size, least)
    wanted = by_hand(chosen, size, least)
    np.testing.assert_array_equal(group_windows(jnp.array(chosen), size, least), wanted)
    assert sum(wanted) <= most_grouped(sum(chosen), size, least)


def test_the_bound_is_reached():
    assert grouped("....xxxxx.....", 8, 5).count("x") == most_grouped(5, 8, 5) == 11


@dataclasses.dataclass(frozen=True)
class Everything(CacheClip):
    """Chooses all rows on the device."""

    def select(self, prompt: Prompt, hits: Any) -> Spans | StagedPlan:
        plan = CacheClip.select(self, prompt, hits)
        if not isinstance(plan, StagedPlan) or not isinstance(plan.stages[1].rows, TopK):
            return Spans(tuple((hit.start, hit.stop) for hit in hits))
        rows = dataclasses.replace(plan.stages[1].rows, k=prompt.num_tokens)
        return StagedPlan((plan.stages[0], dataclasses.replace(plan.stages[1], rows=rows)))


@pytest.mark.parametrize("name", prompts())
def test_running_everything_again_is_full_prefill(name):
    assert_exact(CacheClip(ratio=1.0), prompts()[name])


@pytest.mark.parametrize("name", ["order", "text between", "twice", "one token"])
def test_windows_over_everything_are_full_prefill(name):
    assert_exact(Everything(least=1), prompts()[name])


def test_exact_prefixes_and_chunks_compose():
    assert_exact_behind_a_prefix(CacheClip(ratio=1.0))
    assert_exact_behind_a_prefix(Everything(least=1))


def test_the_first_chunk_behind_the_shared_prefix_is_exact_and_the_prefix_is_there_once():
    llm = fresh_llm()
    prompt = [SYSTEM, Chunk(FIRST), QUESTION]
    wanted = full_prefill(llm, prompt)
    out = answer(llm, prompt, CacheClip(ratio=0.0))
    assert distance(out, wanted) <= 1e-4
    assert out.reuse.exact >= len(FIRST)
    (variant,) = llm.engine.chunks.store
    assert (variant.base, variant.num_tokens) == (len(SYSTEM), len(FIRST))


def test_chunks_that_are_put_ahead_are_behind_the_given_prefix():
    llm, prefix = fresh_llm(), tuple(ord(c) for c in SYSTEM)
    strategy = CacheClip(ratio=0.0, prefix=prefix)
    assert all(put.stored for put in llm.chunks.put([FIRST, SECOND], strategy=strategy))
    assert {v.context_ids for v in llm.engine.chunks.store} == {prefix}
    out = answer(llm, [SYSTEM, Chunk(SECOND), Chunk(FIRST), QUESTION], strategy)
    assert len(llm.engine.chunks.store) == 2
    assert out.reuse.shifted == len(FIRST)


def test_what_runs_again_is_windows():
    llm = fresh_llm()
    prompt = [SYSTEM, Chunk(FIRST), Chunk(SECOND), Chunk(THIRD), QUESTION]
    report = answer(llm, prompt, CacheClip(ratio=0.4, window=4, least=3)).reuse
    again = last_rows(report, Fate.RECOMPUTED)
    k = int(0.4 * len(SECOND + THIRD))
    assert 4 <= len(again) <= most_grouped(k, 4, 3)
    assert again.min() >= len(SYSTEM + FIRST)  # the first chunk is exact
    runs = np.split(again, np.flatnonzero(np.diff(again) != 1) + 1)
    end = len(SYSTEM + FIRST + SECOND + THIRD)
    assert all(len(r) >= 4 or r[0] == len(SYSTEM + FIRST) or r[-1] == end - 1 for r in runs)


def test_the_selector_is_the_first_layers():
    segment, variant = Segment(5, 15, ""), None
    hit = Hit(0, segment, variant, 5, 15)  # type: ignore[arg-type]
    prompt = Prompt(tuple(range(30)), (segment,), None, ModelFacts(7, 64, 2048, 512), 3)
    text = Spans(((3, 5), (15, 29)))
    best = TopK("question_attention_within", 2, window=(8, 5))
    assert CacheClip().select(prompt, [hit]) == StagedPlan((Stage(0, 4, text), Stage(0, 7, best)))
    three = CacheClip(selector_layers=3).select(prompt, [hit])
    assert isinstance(three, StagedPlan)
    assert three.stages[0].l1 == 3


def test_options_are_validated():
    assert parse("cacheclip:ratio=0.3,window=4,least=2") == CacheClip(0.3, 4, 2)
    with pytest.raises(ValueError, match="least must be at most"):
        CacheClip(window=4)
    with pytest.raises(ValueError, match="window must be an integer of at least 1"):
        CacheClip(window=0)
    with pytest.raises(ValueError, match="selector_layers must be an integer of at least 1"):
        CacheClip(selector_layers=0)
