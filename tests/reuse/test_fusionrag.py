"""FusionRAG: enrichment, two passes, and the question's choice."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from kvjax.cache.chunks import VariantKey, tokens_hash
from kvjax.errors import UnknownStrategy
from kvjax.request import Chunk
from kvjax.reuse import FusionRAG, parse
from kvjax.reuse.plan import Spans, Stage, StagedPlan, TopK
from kvjax.reuse.report import Fate
from kvjax.reuse.strategy import Hit, ModelFacts, Prompt, Segment
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

DOCUMENTS = [FIRST, SECOND, THIRD]


@dataclasses.dataclass(frozen=True)
class Everything(FusionRAG):
    """Both passes, and the second one takes every row."""

    def select(self, prompt, hits):
        plan = FusionRAG.select(self, prompt, hits)
        if not isinstance(plan, StagedPlan):
            return plan
        stages = [
            dataclasses.replace(stage, rows=dataclasses.replace(stage.rows, k=prompt.num_tokens))
            if isinstance(stage.rows, TopK)
            else stage
            for stage in plan.stages
        ]
        return StagedPlan(tuple(stages))


@pytest.mark.parametrize("neighbours", [0, 2])
@pytest.mark.parametrize("name", prompts())
def test_running_everything_again_is_full_prefill(name, neighbours):
    out = assert_exact(FusionRAG(ratio=1.0, neighbours=neighbours), prompts()[name])
    assert out.reuse.shifted == 0


@pytest.mark.parametrize("name", prompts())
def test_a_second_pass_over_every_row_is_full_prefill_whatever_the_first_left(name):
    assert_exact(Everything(neighbours=0), prompts()[name])


def test_exact_prefixes_and_chunks_compose():
    assert_exact_behind_a_prefix(FusionRAG(ratio=1.0))
    assert_exact_behind_a_prefix(Everything())


@pytest.mark.parametrize("strategy", [FusionRAG(ratio=1.0, neighbours=2), Everything(neighbours=2)])
def test_enriched_chunks_run_again_are_full_prefill(strategy):
    llm = fresh_llm()
    prompt = [SYSTEM, *map(Chunk, DOCUMENTS), QUESTION]
    wanted = full_prefill(llm, prompt)
    assert [put.stored for put in llm.chunks.put(DOCUMENTS, strategy=strategy)] == [True] * 3
    llm.reset_prefix_cache()
    assert distance(answer(llm, prompt, strategy), wanted) <= 1e-4


def ids(text):
    return tuple(ord(c) for c in text)


def test_enriched_variants_are_preferred_and_raw_ones_serve_without_them():
    llm = fresh_llm()
    enriched, raw = FusionRAG(neighbours=2), FusionRAG(neighbours=0)
    prompt = [SYSTEM, Chunk(FIRST), QUESTION]
    answer(llm, prompt, enriched)
    llm.chunks.put(DOCUMENTS, strategy=enriched)
    llm.chunks.put(DOCUMENTS, strategy=raw)
    facts = ModelFacts(2, 64, 2048, 512)
    seen = Prompt(ids(SYSTEM + FIRST + QUESTION), (segment_of(FIRST, len(SYSTEM)),), None, facts)
    store = llm.engine.chunks.store

    def base(strategy):
        variant = strategy.look_up(seen, 0, store)
        assert variant is not None
        return variant.base

    assert base(enriched) > 0
    assert enriched.wanted(seen, 0, store) is None
    assert base(raw) == 0
    other = FusionRAG(neighbours=1)  # enriched with other settings is not what it asks for
    assert base(other) == 0
    assert other.wanted(seen, 0, store) == ()


def segment_of(text, start):
    return Segment(start, start + len(text), tokens_hash(ids(text)))


def test_the_context_of_a_chunk_is_its_neighbours_as_far_as_they_fit():
    corpus = [(1, 2, 3), (1, 2, 9, 9), (1, 8), (5, 5)]
    assert FusionRAG(neighbours=1).enrich((1, 2, 3), corpus) == (1, 2, 9, 9)
    assert FusionRAG(neighbours=5).enrich((1, 2, 3), corpus) == (1, 2, 9, 9, 1, 8)
    assert FusionRAG(neighbours=5, max_context=3).enrich((1, 2, 3), corpus) == (1, 8)
    assert FusionRAG(neighbours=0).enrich((1, 2, 3), corpus) == ()
    assert FusionRAG().enrich((5, 5), corpus) == ()
    assert FusionRAG(neighbours=1, system=(7,)).enrich((1, 2, 3), corpus) == (7, 1, 2, 9, 9)
    assert FusionRAG(neighbours=0, system=(7,)).enrich((1, 2, 3), corpus) == ()


def test_what_is_put_is_computed_behind_the_system_prompt_and_neighbours_and_told_as_it_goes(
    capsys,
):
    """Its own KV is kept, of a prefill of all (equation 10); keys are turned back to 0."""
    llm = fresh_llm()
    strategy = FusionRAG(neighbours=2, system=ids(SYSTEM))
    puts = llm.chunks.put(DOCUMENTS, strategy=strategy, progress=True)
    assert all(put.stored for put in puts)
    assert f"{len(DOCUMENTS)}/{len(DOCUMENTS)}" in capsys.readouterr().err
    tokens = [ids(text) for text in DOCUMENTS]
    for mine in tokens:
        context = strategy.enrich(mine, tokens)
        assert len(context) > len(SYSTEM)
        k, v = llm.chunks.read(Chunk(mine), context)
        llm.reset_prefix_cache()
        with llm.open([*context, *mine]) as branch:
            layers = branch.kv()
        for layer, held in enumerate(layers):
            np.testing.assert_allclose(v[layer], held.v[len(context) :], atol=1e-4)
        alone = llm.engine.chunks.store.get(VariantKey(None, tokens_hash(mine), ""))
        assert alone is None  # only the enriched one is there
        norms = [np.linalg.norm(x, axis=2) for x in (k[1], layers[1].k[len(context) :])]
        np.testing.assert_allclose(*norms, atol=1e-4)  # a rotation changes no length


def planned(strategy, tokens, *spans, exact=0):
    facts = ModelFacts(6, 64, 2048, 512)
    segments = tuple(Segment(a, b, "") for a, b in spans)
    prompt = Prompt(tuple(range(tokens)), segments, None, facts, exact)
    unread: Any = None
    hits = [Hit(i, s, unread, s.start, s.stop) for i, s in enumerate(segments)]
    return strategy.select(prompt, hits)


def test_the_first_pass_runs_all_text_without_kv_and_the_second_the_best_rows_of_all_layers():
    plan = planned(FusionRAG(ratio=0.25), 30, (5, 13), (15, 27), exact=3)
    text = Spans(((3, 5), (13, 15), (27, 29)))
    best = TopK("question_attention_within", 5)
    assert plan == StagedPlan((Stage(0, 6, text), Stage(0, 6, best)))
    assert isinstance(plan, StagedPlan)
    assert len(plan.passes) == 2


def test_without_a_question_tokens_are_chosen_by_deviation():
    plan = planned(FusionRAG(ratio=0.25), 20, (5, 20))
    assert isinstance(plan, StagedPlan)
    assert [s.rows.score for s in plan.stages if isinstance(s.rows, TopK)] == ["value_deviation"]


def test_a_ratio_of_nothing_runs_nothing_again():
    assert planned(FusionRAG(ratio=0.0), 30, (5, 13)) == Spans(())


def test_as_many_tokens_run_again_as_the_ratio_says_and_none_that_are_exact():
    llm, strategy = fresh_llm(), FusionRAG(ratio=0.25, neighbours=0)
    prompt = [Chunk(FIRST), Chunk(SECOND), Chunk(THIRD), QUESTION]
    report = answer(llm, prompt, strategy).reuse
    again = last_rows(report, Fate.RECOMPUTED)
    assert len(again) == int(0.25 * (len(SECOND) + len(THIRD)))
    assert again.min() >= len(FIRST)
    assert len(last_rows(report, Fate.EXACT)) == len(FIRST)


def test_another_question_chooses_other_tokens():
    llm, strategy = fresh_llm(), FusionRAG(ratio=0.2, neighbours=0)
    documents = [SYSTEM, *map(Chunk, DOCUMENTS)]
    chosen = []
    for question in (QUESTION, "XXXXXXXXXXXX prices?", QUESTION):
        llm.reset_prefix_cache()
        report = answer(llm, [*documents, question], strategy).reuse
        chosen.append(set(last_rows(report, Fate.RECOMPUTED)))
    assert len(chosen[0]) == int(0.2 * len("".join(DOCUMENTS)))
    assert chosen[0] != chosen[1]
    assert chosen[0] == chosen[2]


def test_options_are_validated():
    assert parse("fusionrag:ratio=0.2,neighbours=3") == FusionRAG(ratio=0.2, neighbours=3)
    with pytest.raises(ValueError, match="ratio must be a number"):
        FusionRAG(ratio=1.5)
    with pytest.raises(ValueError, match="neighbours must be an integer of at least 0, got -1"):
        FusionRAG(neighbours=-1)
    with pytest.raises(ValueError, match="similarity must be one of"):
        FusionRAG(similarity="bge")
    with pytest.raises(UnknownStrategy, match="no option 'top'"):
        parse("fusionrag:top=3")
