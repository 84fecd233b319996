"""KVShare: attention times deviation."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from kvjax.request import Chunk
from kvjax.reuse import KVShare, parse
from kvjax.reuse.plan import Spans, Stage, StagedPlan, TopK
from kvjax.reuse.report import Fate
from kvjax.reuse.scores import SCORES
from kvjax.reuse.strategy import Hit, ModelFacts, Prompt, Segment
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
from tests.reuse.test_attention_scores import HEADS, TOKENS, layer


def test_a_score_is_attention_received_times_the_l1_distance_of_values():
    scores = SCORES["attention_value_deviation"](
        layer([3, 9, 16, 17], favourite=3, value_change={3: 0.5, 9: -2.0})
    )
    # Row 3 and all behind it look at key 3 only; two heads deviate by the change.
    wanted = np.zeros(TOKENS)
    wanted[3] = 4 * HEADS * (0.5 + 0.5)
    np.testing.assert_allclose(scores, wanted, rtol=1e-5, atol=1e-5)


def test_spread_attention_weighs_by_how_many_keys_a_row_sees():
    scores = SCORES["attention_value_deviation"](layer([3, 9], value_change={3: 1.0, 9: 1.0}))
    wanted = np.zeros(TOKENS)
    wanted[3], wanted[9] = 2 * HEADS * (1 / 4 + 1 / 10), 2 * HEADS / 10
    np.testing.assert_allclose(scores, wanted, rtol=1e-5)


def test_the_plan_runs_all_rows_to_the_check_layer_and_the_best_from_there():
    segment, variant = Segment(5, 15, ""), None
    hit = Hit(0, segment, variant, 5, 15)  # type: ignore[arg-type]
    prompt = Prompt(tuple(range(30)), (segment,), None, ModelFacts(6, 64, 2048, 512), 3)
    best = TopK("attention_value_deviation", 2)
    assert KVShare(ratio=0.2).select(prompt, [hit]) == StagedPlan(
        (Stage(0, 2, Spans(((3, 29),))), Stage(2, 6, best))
    )


@dataclasses.dataclass(frozen=True)
class Everything(KVShare):
    """Chooses all rows on the device."""

    def select(self, prompt: Prompt, hits: Any) -> Spans | StagedPlan:
        plan = KVShare.select(self, prompt, hits)
        assert isinstance(plan, StagedPlan)
        first, second = plan.stages
        assert isinstance(second.rows, TopK)
        rows = dataclasses.replace(second.rows, k=prompt.num_tokens)
        return StagedPlan((first, dataclasses.replace(second, rows=rows)))


@pytest.mark.parametrize("name", prompts())
def test_running_everything_again_is_full_prefill(name):
    assert_exact(KVShare(ratio=1.0), prompts()[name])


@pytest.mark.parametrize("name", ["order", "text between", "twice", "one token"])
def test_choosing_everything_on_the_device_is_full_prefill(name):
    assert_exact(Everything(check_layer=0), prompts()[name])


def test_exact_prefixes_and_chunks_compose():
    assert_exact_behind_a_prefix(KVShare(ratio=1.0))
    assert_exact_behind_a_prefix(Everything(check_layer=0))


def test_as_many_tokens_run_again_as_the_ratio_says():
    llm = fresh_llm()
    prompt = [SYSTEM, Chunk(FIRST), Chunk(SECOND), QUESTION]
    report = answer(llm, prompt, KVShare(ratio=0.25, check_layer=0)).reuse
    reused = len(FIRST + SECOND)
    assert len(last_rows(report, Fate.RECOMPUTED)) == int(0.25 * reused)


def test_options_are_validated():
    assert parse("kvshare:ratio=0.3,check_layer=2") == KVShare(0.3, 2)
    with pytest.raises(ValueError, match="ratio must be a number in"):
        KVShare(ratio=-1)
    with pytest.raises(ValueError, match="check_layer must be an integer of at least 0"):
        KVShare(check_layer=-1)
