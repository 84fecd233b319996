"""CacheBlend: what deviates most in the check layer is run again; its ratio may follow a link."""

from typing import Any

import numpy as np
import pytest

from kvjax import Chunk, SamplingParams
from kvjax.cache.chunks import Variant, VariantKey, tokens_hash
from kvjax.errors import UnknownStrategy
from kvjax.reuse import CacheBlend, parse
from kvjax.reuse.link import hidden_ratio
from kvjax.reuse.plan import Spans, StagedPlan, TopK
from kvjax.reuse.report import Fate
from kvjax.reuse.strategy import Hit, ModelFacts, Prompt, Segment
from tests.reuse.families import deep_llm
from tests.reuse.prompts import FIRST, QUESTION, SECOND, SYSTEM, last_rows

FACTS = ModelFacts(num_layers=30, hidden_size=576, kv_token_bytes=23_040, hidden_token_bytes=1)


def plan(strategy: CacheBlend, reused: int = 100, text: int = 20) -> StagedPlan | Spans:
    tokens = tuple(range(reused + text + 1))
    segment = Segment(text, text + reused, tokens_hash(tokens[text : text + reused]))
    variant = Variant(VariantKey(None, segment.chunk, ""), np.arange(reused), 0, [], 0)
    hit = Hit(0, segment, variant, segment.start, segment.stop)
    return strategy.select(Prompt(tokens, (segment,), None, FACTS), (hit,))


def test_every_row_runs_to_the_check_layer_and_the_ratio_of_the_reused_from_there():
    found = plan(CacheBlend())
    assert isinstance(found, StagedPlan)
    first, second = found.stages
    assert (first.l0, first.l1, second.l0, second.l1) == (0, 2, 2, 30)
    assert first.rows == Spans(((0, 120),))
    assert second.rows == TopK("value_deviation", 15)
    assert found.mask == "position"


def test_gradual_filtering_narrows_and_keeps_the_ratio_in_the_mean_over_layers():
    found = plan(CacheBlend(ratio=0.2, gradual=True, first=1.5, steps=3), reused=10_000)
    assert isinstance(found, StagedPlan)
    stages = found.stages[1:]
    counts = [stage.rows.k for stage in stages if isinstance(stage.rows, TopK)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 3000
    assert [(s.l0, s.l1) for s in stages] == [(2, 3), (3, 4), (4, 5), (5, 30)]
    total = sum(k * (s.l1 - s.l0) for k, s in zip(counts, stages, strict=True))
    assert total / 28 == pytest.approx(2000, abs=2)


@pytest.mark.parametrize(("megabytes", "ratio"), [(1e6, 0.15), (100, 0.15), (20, 0.576), (5, 1.0)])
def test_the_controller_computes_as_long_as_loading_takes(megabytes, ratio):
    """23,040 bytes a token at 500 tokens a second: at 20 MB/s loading takes 0.576 of computing."""
    strategy = CacheBlend(link=megabytes * 1e6, prefill=500.0)
    assert strategy.ratio_for(FACTS) == pytest.approx(ratio)
    assert hidden_ratio(1 / 500, 23_040 / (megabytes * 1e6)) == pytest.approx(ratio)
    found = plan(strategy)
    if ratio == 1:
        assert found == Spans(((20, 120),))
    else:
        assert isinstance(found, StagedPlan)
        assert found.stages[1].rows == TopK("value_deviation", int(ratio * 100))


@pytest.fixture(scope="module")
def deep() -> Any:
    return deep_llm()


def kv_of(llm: Any, reuse: str | None) -> tuple[Any, Any]:
    """KV of a prompt layer by layer, and the report, with no prefix cached."""
    llm.reset_prefix_cache()
    prompt = [SYSTEM, Chunk(FIRST), Chunk(SECOND), QUESTION]
    with llm.open(prompt, SamplingParams(reuse=reuse)) as branch:
        return branch.kv(), branch.reuse


CHUNKS = slice(len(SYSTEM), len(SYSTEM + FIRST + SECOND))


@pytest.mark.parametrize("score", ["v", "k", "kv"])
@pytest.mark.parametrize("update", ["all", "chosen"])
def test_what_goes_on_deviates_most_in_the_check_layer_whose_fresh_kv_stays_or_goes(
    deep, score, update
):
    """Layer 1 is the first to see other text; what is computed there is a full prefill's."""
    (full, _), (naive, _) = kv_of(deep, None), kv_of(deep, "naive")
    found, report = kv_of(deep, f"cacheblend:ratio=0.3,score={score},update={update}")
    distance = sum(
        np.square(getattr(full[1], part) - getattr(naive[1], part)).sum(axis=(1, 2))[CHUNKS]
        for part in score
    )
    count = int(0.3 * len(FIRST + SECOND))
    wanted = CHUNKS.start + np.sort(np.argsort(-distance, kind="stable")[:count])
    chosen = last_rows(report, Fate.RECOMPUTED)
    np.testing.assert_array_equal(chosen, wanted)
    rest = np.setdiff1d(np.arange(CHUNKS.start, CHUNKS.stop), chosen)
    kept = full if update == "all" else naive
    assert np.abs(full[1].v[rest] - naive[1].v[rest]).max() > 0.01
    for part in "kv":
        mine, fresh, held = (getattr(kv[1], part) for kv in (found, full, kept))
        np.testing.assert_allclose(mine[chosen], fresh[chosen], atol=1e-4)
        np.testing.assert_allclose(mine[rest], held[rest], atol=1e-4)
        last, stored = getattr(found[2], part), getattr(naive[2], part)
        np.testing.assert_allclose(last[rest], stored[rest], atol=1e-4)


@pytest.mark.parametrize(
    "options",
    ["ratio=1.5", "ratio=-0.1", "score=q", "update=none", "mask=upper", "first=0.5", "steps=0",
     "check_layer=-1", "link=5", "link=0,prefill=2"],
)  # fmt: skip
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=options.split("=")[0]):
        parse(f"cacheblend:{options}")


def test_an_option_that_is_not_there_is_named():
    with pytest.raises(UnknownStrategy, match="cacheblend has no option 'share'"):
        parse("cacheblend:share=0.1")
