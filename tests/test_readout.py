"""Logits and KV of parked prompts, against the model run by itself and against what is drawn."""

from typing import Any

import numpy as np
import pytest

from kvjax import LLM, SamplingParams
from kvjax.request import Chunk
from tests.models.run_model import PagedRun, logits_in_one_step
from tests.tiny_model import tiny, tiny_model

PROMPT = "a prompt of some forty letters, no more"  # its last token is within a page
CONTINUATION = [70, 71, 72, 73, 74]
MARKED = ["begin ", Chunk("the first chunk has these words. "), Chunk("and these the second. "),
          "which?"]  # fmt: skip


@pytest.fixture(scope="module")
def shared() -> LLM:
    return tiny(LLM, fresh=True, num_pages=64, max_model_len=256)


@pytest.fixture
def llm(shared):
    yield shared
    while shared.engine.has_work:
        shared.engine.step()
    shared.engine.check_integrity()
    shared.reset_prefix_cache()


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("length", [1, 16, 17, 32, len(PROMPT)])
def test_logits_of_a_branch_are_those_of_one_forward_over_all_tokens(llm, length):
    with llm.open(PROMPT[:length]) as branch:
        got = branch.logits(CONTINUATION)
        ids = np.array([*branch.token_ids, *CONTINUATION], np.int32)
    expected = logits_in_one_step(tiny_model(), [ids])[0][length - 1 :]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_scoring_changes_nothing_that_the_branch_or_the_cache_holds(llm):
    with llm.open(PROMPT) as branch:
        before, free = branch.kv(), llm.engine.scheduler.pool.num_free
        first = branch.logits(CONTINUATION)
        branch.logits([9] * 40)
        assert llm.engine.scheduler.pool.num_free == free
        for old, new in zip(before, branch.kv(), strict=True):
            np.testing.assert_array_equal(old.k, new.k)
            np.testing.assert_array_equal(old.v, new.v)
        np.testing.assert_array_equal(branch.logits(CONTINUATION), first)


def test_kv_of_a_branch_is_that_of_the_model_run_by_itself(llm):
    with llm.open(PROMPT) as branch:
        got, ids = branch.kv(), np.array(branch.token_ids, np.int32)
    run = PagedRun(tiny_model(), num_seqs=1, max_len=len(ids), max_tokens=len(ids))
    run.step({0: ids})
    at = np.arange(len(ids))
    layers: Any = run.pages.layers
    for mine, held in zip(got, layers, strict=True):
        for layer, pool in ((mine.k, held.k), (mine.v, held.v)):
            expected = np.asarray(pool)[run.tables[0][at // 16], :, at % 16]
            np.testing.assert_allclose(layer, expected, atol=1e-4)


@pytest.mark.parametrize("spec", ["prefix", "naive", "epic:k=4", "cacheblend:ratio=0.3"])
def test_logits_behind_a_reused_prompt_are_what_its_tokens_are_drawn_from(llm, spec):
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=5, reuse=spec)
    drawn = llm.generate([MARKED], params)[0]
    llm.reset_prefix_cache()
    tokens = drawn.outputs[0].token_ids
    with llm.open(MARKED, params) as branch:
        assert branch.token_ids == drawn.prompt_token_ids
        assert branch.reuse.strategy == drawn.reuse.strategy
        assert branch.reuse.copied_tokens == drawn.reuse.copied_tokens
        logprobs = log_softmax(branch.logits(tokens[:-1]))
    for row, token, entries in zip(logprobs, tokens, drawn.outputs[0].logprobs, strict=True):
        assert int(row.argmax()) == token
        for other, entry in entries.items():
            assert row[other] == pytest.approx(entry.logprob, abs=1e-4)


def test_reuse_shows_in_the_kv_of_a_branch_and_recomputing_everything_does_not(llm):
    def kv(spec):
        llm.reset_prefix_cache()
        with llm.open(MARKED, SamplingParams(reuse=spec)) as branch:
            return branch.kv()

    full, naive, all_of_it = kv("prefix"), kv("naive"), kv("random:ratio=1")
    np.testing.assert_allclose(naive[0].k, full[0].k, atol=1e-4)  # the first layer sees no context
    assert np.abs(naive[1].v - full[1].v).max() > 1e-2
    for a, b in zip(all_of_it, full, strict=True):
        np.testing.assert_allclose(a.k, b.k, atol=1e-4)
        np.testing.assert_allclose(a.v, b.v, atol=1e-4)


def test_what_cannot_be_scored_is_refused_before_any_work(llm):
    with llm.open(PROMPT) as branch:
        with pytest.raises(ValueError, match="max_model_len is 256"):
            branch.logits([1] * 300)
        with pytest.raises(ValueError, match="vocabulary"):
            branch.logits([999])
        branch.append("more")
        with pytest.raises(ValueError, match="4 tokens of the branch are not computed"):
            branch.logits()
    with pytest.raises(ValueError, match="two salts"):
        llm.open(PROMPT, SamplingParams(cache_salt="a"), cache_salt="b")
