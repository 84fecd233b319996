"""HCache: KV from hidden states is the KV that was computed."""

import numpy as np
import pytest

from kvjax import LLM, SamplingParams
from kvjax.errors import ReuseRefused, UnknownChunk
from kvjax.request import Chunk
from kvjax.reuse import HCache, parse
from kvjax.reuse.gate import Gate, Limits, Verdicts
from kvjax.reuse.report import Fate
from kvjax.reuse.restore import HIDDEN
from kvjax.reuse.strategy import ModelFacts
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
from tests.tiny_model import CONFIG, tiny

PROMPT = [SYSTEM, Chunk(FIRST), " and ", Chunk(SECOND), QUESTION]
REUSE = SamplingParams(reuse="hcache")


def kv(llm, prompt, params=None):
    llm.reset_prefix_cache()
    with llm.open(prompt, params) as branch:
        return branch.kv(), branch.reuse


@pytest.mark.parametrize("prompt", [PROMPT, [Chunk(FIRST), QUESTION], [SYSTEM, Chunk("x"), "?"]])
def test_restored_kv_is_the_computed_kv_in_every_layer(prompt):
    llm = fresh_llm()
    wanted, _ = kv(llm, prompt)
    kv(llm, prompt, REUSE)  # hidden states are saved
    found, report = kv(llm, prompt, REUSE)
    chunks = sum(len(part.content) for part in prompt if isinstance(part, Chunk))
    assert report.copied_tokens == chunks
    assert report.run_layer_tokens == 2 * (report.num_tokens - chunks)
    assert len(found) == CONFIG.num_layers
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.k, other.k, atol=1e-4)
        np.testing.assert_allclose(one.v, other.v, atol=1e-4)


@pytest.mark.parametrize("name", prompts())
def test_answers_are_full_prefills_and_every_chunk_is_exact(name):
    out = assert_exact("hcache", prompts()[name])
    assert out.reuse.shifted == out.reuse.recomputed == 0
    assert out.reuse.copied_tokens > 0


def test_exact_prefixes_and_restored_chunks_compose():
    assert_exact_behind_a_prefix("hcache")


def test_what_is_kept_takes_no_pages_and_outlives_the_device():
    llm = tiny(LLM, fresh=True, num_pages=64, max_model_len=256)
    wanted = full_prefill(llm, PROMPT)
    answer(llm, PROMPT, "hcache")
    llm.reset_prefix_cache()
    assert llm.engine.scheduler.pool.num_free == 64
    llm.engine._start_over()
    assert len(llm.engine.chunks.store) == 2
    assert llm.engine.scheduler.chunks.evict(10) == 0
    out = answer(llm, PROMPT, "hcache")
    assert len(last_rows(out.reuse, Fate.EXACT)) == len(FIRST + SECOND)
    assert distance(out, wanted) <= 1e-4
    llm.engine.check_integrity()
    (variant, _) = llm.engine.chunks.store
    with pytest.raises(UnknownChunk):
        llm.chunks.read(variant)
    assert variant.arrays[HIDDEN].shape == (CONFIG.num_layers, len(FIRST), CONFIG.hidden_size)


def test_a_chunk_behind_other_text_is_not_restored_from_what_was_kept():
    llm = fresh_llm()
    answer(llm, [SYSTEM, Chunk(FIRST), QUESTION], "hcache")
    prompt = ["Something else. ", Chunk(FIRST), QUESTION]
    wanted = full_prefill(llm, prompt)
    assert distance(answer(llm, prompt, "hcache"), wanted) <= 1e-4
    assert len(llm.engine.chunks.store) == 2


def test_asking_exactly_afterwards_is_cold():
    llm = fresh_llm()
    wanted = full_prefill(llm, PROMPT)
    answer(llm, PROMPT, "hcache")
    llm.reset_prefix_cache()
    answer(llm, PROMPT, "hcache")
    assert distance(answer(llm, PROMPT), wanted) <= 1e-4


def test_other_strategies_do_not_meet_what_has_no_pages():
    llm = fresh_llm()
    prompt = [Chunk(FIRST), Chunk(SECOND), QUESTION]  # the first one's context is none
    answer(llm, prompt, "hcache")
    llm.chunks.put([FIRST, SECOND], strategy="naive")
    for spec in ("naive", "tablecache", "relaycaching:detect=1", "fusionrag", "hcache"):
        llm.reset_prefix_cache()
        out = answer(llm, prompt, spec)
        assert out.error is None
        assert out.reuse.copied_tokens == len(FIRST + SECOND)
    assert sorted(bool(v.page_ids) for v in llm.engine.chunks.store) == [False, False, True, True]
    llm.engine.check_integrity()


def test_the_host_is_bounded_too():
    llm = tiny(LLM, fresh=True, num_pages=40, max_model_len=256, chunk_cache_share=0.1)
    for text in (FIRST, SECOND, THIRD):
        answer(llm, [SYSTEM, Chunk(text), QUESTION], "hcache")
    store = llm.engine.chunks.store
    assert sum(store.size(v) for v in store) <= store.capacity_pages == 4
    assert store.stats.evicted > 0


def test_documents_can_be_put_ahead():
    llm = fresh_llm()
    assert llm.chunks.put([FIRST], strategy="hcache")[0].stored
    llm.reset_prefix_cache()
    out = answer(llm, [Chunk(FIRST), QUESTION], "hcache")
    assert out.reuse.exact == len(FIRST)
    assert len(llm.engine.chunks.store) == 1


def test_beside_narrow_kv_it_is_near_and_says_that_it_is_not_exact():
    llm = tiny(LLM, "bfloat16", fresh=True, num_pages=64, max_model_len=256)
    wanted, _ = kv(llm, PROMPT)
    kv(llm, PROMPT, REUSE)
    found, report = kv(llm, PROMPT, REUSE)
    assert report.shifted == len(FIRST + SECOND)
    for one, other in zip(found, wanted, strict=True):
        scale = np.abs(other.k).max()
        assert np.abs(one.k - other.k).max() < 0.05 * scale
    with llm.open(PROMPT) as branch:
        assert branch.reuse.exact == len(SYSTEM)  # nothing restored is hit as exact


# Of bfloat16 models: bytes per token of hidden states and of KV, over all layers.
LLAMA2_7B = ModelFacts(32, 4096, 2 * 2 * 32 * 4096, 2 * 32 * 4096)
LLAMA3_8B = ModelFacts(32, 4096, 2 * 2 * 32 * 8 * 128, 2 * 32 * 4096)
HALF = ModelFacts(32, 4096, 2 * 2 * 32 * 16 * 128, 2 * 32 * 4096)  # two query heads per KV head
SMOLLM2 = ModelFacts(30, 576, 23_040, 34_560)


def test_it_serves_where_hidden_states_are_smaller_than_kv_and_nowhere_else(tmp_path):
    assert HCache().refusal(LLAMA2_7B) is None
    for facts in (LLAMA3_8B, HALF, SMOLLM2):
        assert HCache().refusal(facts) is not None
    verdicts = Verdicts(tmp_path, lambda: "model", "bfloat16", "bfloat16")
    Gate(verdicts, Limits(0.1, 0.8), facts=LLAMA2_7B).check(HCache())
    Gate(verdicts, Limits(0.1, 0.8), facts=SMOLLM2, forced=True).check(HCache())
    with pytest.raises(ReuseRefused, match="34560 bytes per token on this model, its KV 23040"):
        Gate(verdicts, Limits(0.1, 0.8), facts=SMOLLM2).check(HCache())


def test_facts_count_what_is_kept():
    facts = fresh_llm().engine.chunks.facts
    assert facts.hidden_token_bytes == 4 * CONFIG.num_layers * CONFIG.hidden_size
    assert facts.kv_token_bytes == 4 * 2 * CONFIG.num_layers * 2 * 64
    assert parse("hcache") == HCache()
