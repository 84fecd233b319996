"""Exactness gates: where reuse is exact it equals a full prefill, and it never leaks into one."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import LLM, SamplingParams
from kvjax.cache.chunks import tokens_hash
from kvjax.pallas_kernels import gather_slots
from kvjax.request import Chunk, RequestOutput
from kvjax.reuse import STRATEGIES, parse
from kvjax.reuse.report import Fate
from tests.tiny_model import tiny

A = "thequickbrownfoxjumpsoverthelazydogandrunsawayintothewoods"
B = "packmyboxwithfivedozenliquorjugssaidthemayor"
SYSTEM, QUESTION = "answerfrom", "whatisinthebox"
PARAMS = SamplingParams(max_tokens=4, temperature=0, logprobs=8)
FULL_RECOMPUTE = (
    "epic:k=200",
    "random:ratio=1",
    "cacheblend:ratio=1",
    "cacheblend:check_layer=0,ratio=1",
    "cachecraft:ratio=1",
    "kvcomm:gamma=0",
)
PARTIAL = (
    "naive",
    "epic:k=4",
    "random:ratio=0.3",
    "cacheblend:check_layer=0,ratio=0.3",
    "tablecache",
)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny(LLM, fresh=True, num_pages=160, max_model_len=256)


def run(llm: LLM, prompt: Any, spec: str | None, **options: Any) -> RequestOutput:
    """One answer, with no prefix cached but by the run itself."""
    llm.reset_prefix_cache()
    return again(llm, prompt, spec, **options)


def again(llm: LLM, prompt: Any, spec: str | None, **options: Any) -> RequestOutput:
    out = llm.generate([prompt], dataclasses.replace(PARAMS, reuse=spec, **options))[0]
    assert out.error is None
    llm.engine.check_integrity()
    return out


def distance(a: RequestOutput, b: RequestOutput) -> float:
    """Largest difference of log-probabilities at the first token; infinite if others lead."""
    x, y = a.outputs[0].logprobs, b.outputs[0].logprobs
    assert x is not None
    assert y is not None
    if set(x[0]) != set(y[0]):
        return float("inf")
    return max(abs(x[0][i].logprob - y[0][i].logprob) for i in x[0])


PROMPT = [SYSTEM, Chunk(A), Chunk(B), QUESTION]


@pytest.mark.parametrize("spec", FULL_RECOMPUTE)
def test_recomputing_everything_is_a_full_prefill(llm, spec):
    for prompt in (PROMPT, [SYSTEM, Chunk(B), Chunk(A), QUESTION], PROMPT):  # some learn from them
        full, out = run(llm, prompt, None), run(llm, prompt, spec)
        assert out.outputs[0].token_ids == full.outputs[0].token_ids
        assert distance(out, full) < 1e-4


@pytest.mark.parametrize("spec", PARTIAL)
def test_partial_reuse_is_not_a_full_prefill_but_reports_what_it_did(llm, spec):
    full = run(llm, PROMPT, None)
    out = run(llm, PROMPT, spec)
    assert distance(out, full) > 1e-4  # else the gates above would show nothing
    report = out.reuse
    chunk_tokens = len(A) + len(B)
    last = report.groups[-1]
    assert last.shifted + last.recomputed == chunk_tokens
    assert last.computed == len(SYSTEM) + len(QUESTION)
    assert report.copied_tokens == chunk_tokens


def test_what_a_staged_prefill_chooses_is_its_share(llm):
    out = run(llm, PROMPT, "cacheblend:check_layer=0,ratio=0.3")
    first, second = out.reuse.groups
    assert (first.l0, first.l1, second.l0, second.l1) == (0, 1, 1, 2)
    assert first.recomputed == len(A) + len(B)
    assert second.recomputed == int(0.3 * (len(A) + len(B)))


def test_a_chunk_that_begins_the_prompt_is_an_exact_prefix(llm):
    prompt = [Chunk(A), QUESTION]
    full = run(llm, prompt, None)
    out = run(llm, prompt, "naive")
    assert distance(out, full) < 1e-4
    assert out.reuse.exact == len(A)
    assert out.reuse.shifted == 0


def kv_of(llm: LLM, prompt: Any, spec: str | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys and values of a prompt's tokens, layer by layer."""
    llm.reset_prefix_cache()
    params = SamplingParams(max_tokens=1, reuse=spec)
    request = llm._intake.request(prompt, params, samples=False)
    (sequence,) = request.sequences
    sequence.keeps_pages = True
    for _ in llm._run([request]):
        pass
    at = np.arange(len(sequence.tokens))
    slots = jnp.asarray(np.asarray(sequence.page_ids)[at // 16] * 16 + at % 16, jnp.int32)
    held = llm.engine.runner.pages
    assert held is not None
    kv = [gather_slots(pages, slots, widths=(64, 64)) for pages in held.layers]
    llm.engine.discard(sequence)
    return [(np.asarray(k), np.asarray(v)) for k, v in kv]


@pytest.mark.parametrize("spec", PARTIAL)
def test_layer_0_of_a_moved_chunk_is_that_of_a_full_prefill(llm, spec):
    """There KV depends on the token and its position alone."""
    (k, v), *_ = kv_of(llm, PROMPT, spec)
    (full_k, full_v), *deeper = kv_of(llm, PROMPT, None)
    np.testing.assert_allclose(k, full_k, atol=1e-4)
    np.testing.assert_array_equal(v, full_v)
    (wrong, _), *_ = kv_of(llm, PROMPT, "naive_no_rotation")
    assert np.abs(wrong - full_k).max() > 0.01
    assert deeper


@pytest.mark.parametrize("spec", [*PARTIAL, "epic:k=200"])
def test_a_prefix_hit_and_chunk_hits_compose(llm, spec):
    """The index mix-up that the field knows best: hits behind an exact prefix that is there."""
    cold = run(llm, PROMPT, spec)
    llm.reset_prefix_cache()
    again(llm, SYSTEM + "x", None)  # the system text is an exact prefix now, ending inside a page
    warm = again(llm, PROMPT, spec)
    assert warm.reuse.exact == len(SYSTEM)
    assert distance(warm, cold) < 1e-5
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids


@pytest.mark.parametrize("spec", PARTIAL)
def test_asking_exactly_after_a_blend_is_a_cold_full_prefill(llm, spec):
    full = run(llm, PROMPT, None)
    run(llm, PROMPT, spec)
    out = again(llm, PROMPT, None)
    assert out.num_cached_tokens <= len(SYSTEM)  # no approximate page was hit
    assert distance(out, full) == 0
    assert out.outputs[0].token_ids == full.outputs[0].token_ids


@pytest.mark.parametrize("spec", PARTIAL)
def test_the_same_blend_again_is_found_whole(llm, spec):
    first = run(llm, PROMPT, spec)
    second = again(llm, PROMPT, spec)
    assert second.reuse.run_layer_tokens == 2  # the last token, in two layers
    assert distance(first, second) == 0


@pytest.mark.parametrize("spec", PARTIAL)
@pytest.mark.parametrize(
    "prompt",
    [
        [SYSTEM, Chunk(B), Chunk(A), QUESTION],  # another order
        [SYSTEM, Chunk(A), "andthen", Chunk(B), QUESTION],  # a hole
        [SYSTEM, Chunk("x"), Chunk("y"), QUESTION],  # one token each
        [SYSTEM, Chunk(A), Chunk(A), QUESTION],  # twice
        [SYSTEM, Chunk(A)],  # nothing behind
        [Chunk(B), Chunk(A)],  # nothing but chunks
        [Chunk("x")],
    ],
    ids=["order", "hole", "one-token", "twice", "no-question", "only-chunks", "single"],
)
def test_every_arrangement_is_served_and_full_recompute_is_exact(llm, prompt, spec):
    out = run(llm, prompt, spec)
    assert sum(dataclasses.astuple(out.reuse.groups[-1])[2:]) == len(out.prompt_token_ids)
    full = run(llm, prompt, None)
    assert distance(run(llm, prompt, "epic:k=200"), full) < 1e-4


def test_concurrent_requests_share_a_chunk_that_no_one_changes(llm):
    prompts = [[SYSTEM, Chunk(A), Chunk(B), q] for q in ("first", "second", "third", "fourth")]
    llm.reset_prefix_cache()
    params = dataclasses.replace(PARAMS, reuse="epic:k=4")
    together = llm.generate(prompts, params)
    alone = [run(llm, prompt, "epic:k=4") for prompt in prompts]
    for a, b in zip(together, alone, strict=True):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
        assert distance(a, b) < 1e-5


def test_branches_of_a_blended_prompt_share_it(llm):
    one = run(llm, PROMPT, "epic:k=4", n=3)
    assert len({completion.token_ids for completion in one.outputs}) == 1  # greedy


def test_chunks_of_one_tenant_do_not_serve_another(llm):
    run(llm, PROMPT, "naive", cache_salt="a")
    before = llm.engine.chunks.stats.hits
    run(llm, PROMPT, "naive", cache_salt="b")
    assert llm.engine.chunks.stats.hits > before  # its own, encoded for it
    assert len(llm.engine.chunks.store.variants("b", _hash(A))) == 1


def _hash(text: str) -> str:
    return tokens_hash([ord(letter) for letter in text])


def test_a_chunk_that_no_store_can_hold_is_computed_like_text(llm):
    small = tiny(LLM, fresh=True, num_pages=64, max_model_len=256, chunk_cache_share=0.0)
    out = run(small, PROMPT, "naive")
    assert out.reuse.computed == len(out.prompt_token_ids)
    assert distance(out, run(llm, PROMPT, None)) < 1e-5


def test_chunks_give_way_when_running_requests_need_their_pages():
    llm = tiny(LLM, fresh=True, num_pages=20, max_model_len=256)
    for spec in ("naive", None, "epic:k=4", None):
        assert run(llm, PROMPT, spec).outputs[0].finish_reason == "length"
        text = "z" * 230
        assert again(llm, text, None).outputs[0].finish_reason == "length"
    llm.engine.check_integrity()


@pytest.mark.parametrize("spec", PARTIAL)
def test_a_blend_that_is_preempted_gives_the_same_tokens(llm, spec):
    calm = run(llm, PROMPT, spec, max_tokens=24)
    llm.reset_prefix_cache()
    params = dataclasses.replace(PARAMS, reuse=spec, max_tokens=24)
    request = llm._intake.request(PROMPT, params)
    (sequence,) = request.sequences
    llm.engine.add(request)
    preempted = False
    while not request.finished:
        llm.engine.step()
        if sequence.num_output == 9 and not preempted:
            llm.engine.scheduler.preempt(sequence)
            llm.reset_prefix_cache()
            preempted = True
    assert preempted
    assert sequence.output_ids == calm.outputs[0].token_ids
    llm.engine.check_integrity()


def test_blends_that_do_not_fit_together_all_finish():
    """A chunk that had to leave meanwhile is computed like text."""
    tight = tiny(LLM, fresh=True, num_pages=19, max_model_len=256)
    prompts = [PROMPT, PROMPT, [SYSTEM, Chunk(A), "other"]]
    outs = tight.generate(prompts, dataclasses.replace(PARAMS, reuse="epic:k=4", max_tokens=24))
    assert [len(out.outputs[0].token_ids) for out in outs] == [24, 24, 24]
    tight.engine.check_integrity()


def test_pinned_documents_put_ahead_of_time_are_hit(llm):
    assert all(put.stored for put in llm.chunks.put([A, B], strategy="naive"))
    assert llm.chunks.pin(Chunk(A)) >= 1
    hits = llm.engine.chunks.stats.hits
    run(llm, PROMPT, "naive")
    assert llm.engine.chunks.stats.hits == hits + 2
    llm.chunks.unpin(Chunk(A))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nosuch", "there are"),
        ("epic:depth=3", "it has"),
        ("epic:k=-1", "at least 0"),
        ("epic:k=two", "int"),
        ("cacheblend:ratio=1.5", r"\[0, 1\]"),
        ("cacheblend:mask=left", "mask must be one of"),
        ("random:ratio=x", "float"),
    ],
)
def test_a_wrong_strategy_is_refused_before_any_work(llm, spec, message):
    with pytest.raises(ValueError, match=message):
        llm.generate([PROMPT], SamplingParams(reuse=spec))


def test_an_empty_chunk_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        Chunk("")


def test_every_strategy_is_told_by_its_own_spec():
    for kind in STRATEGIES.values():
        strategy = kind()
        assert parse(strategy.spec) == strategy or type(parse(strategy.spec)) is kind


def test_the_oracle_takes_the_deviations_of_the_request(llm):
    deviation = [float(i) for i in range(len(SYSTEM) + len(A) + len(B) + len(QUESTION))]
    out = run(llm, PROMPT, "oracle:ratio=0.1", extra_args={"oracle": deviation})
    again_rows = np.flatnonzero(out.reuse.fates[0] == Fate.RECOMPUTED)
    stop = len(SYSTEM) + len(A) + len(B)
    assert again_rows.tolist() == list(range(stop - len(again_rows), stop))
