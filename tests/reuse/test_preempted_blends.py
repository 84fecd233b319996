"""A blend that is preempted under memory pressure goes on from the chunks it began with."""

import dataclasses

import pytest

from kvjax import LLM, SamplingParams
from kvjax.cache.chunks import tokens_hash
from kvjax.request import Chunk
from tests.tiny_model import tiny

A = "thequickbrownfoxjumpsoverthelazydogandrunsawayintothewoods"
B = "packmyboxwithfivedozenliquorjugssaidthemayor"
FILLERS = ["sphinxofblackquartz" * 2, "jackdawslovemybigx" * 2]
PROMPT = ["answerfrom", Chunk(A), Chunk(B), "whatisinthebox"]
PARAMS = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, reuse="epic:k=4")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny(LLM, fresh=True, num_pages=64, max_model_len=256)


def holds(llm: LLM) -> dict[str, int]:
    """By chunk."""
    store = llm.engine.chunks.store
    return {
        text[:3]: sum(v.holds for v in store.variants(None, tokens_hash(map(ord, text))).values())
        for text in (A, B, *FILLERS)
    }


def test_what_leaves_for_want_of_pages_are_chunks_that_nobody_is_about_to_need_again(llm):
    calm = llm.generate([PROMPT], PARAMS)[0]
    assert all(put.stored for put in llm.chunks.put(FILLERS, strategy="naive"))
    llm.reset_prefix_cache()
    request = llm._intake.request(PROMPT, PARAMS)
    (sequence,) = request.sequences
    llm.engine.add(request)
    while sequence.num_output < 9:
        llm.engine.step()
    assert holds(llm) == {"the": 1, "pac": 1, "sph": 0, "jac": 0}
    store = llm.engine.chunks.store
    for text in FILLERS:  # used last: alone, this would keep them
        (filler,) = store.variants(None, tokens_hash(map(ord, text))).values()
        store.use(filler)
    llm.engine.scheduler.preempt(sequence)
    llm.reset_prefix_cache()
    assert store.evict(1) >= 1
    assert store.evict(1) >= 1
    assert set(holds(llm).values()) == {0, 1}
    while not request.finished:
        llm.engine.step()
    assert store.stats.variants == 2
    assert sequence.output_ids == calm.outputs[0].token_ids
    assert (request.report.fates == calm.reuse.fates).all()
    assert set(holds(llm).values()) == {0}
    llm.engine.check_integrity()


def test_held_chunks_go_when_nothing_else_can(llm):
    """They are not pinned: a sequence must not starve for its own chunks."""
    llm.reset_prefix_cache()
    request = llm._intake.request(PROMPT, dataclasses.replace(PARAMS, max_tokens=4))
    llm.engine.add(request)
    while not request.sequences[0].num_output:
        llm.engine.step()
    assert llm.engine.chunks.store.evict(1000) > 0
    assert llm.chunks.stats.variants == 0
    while not request.finished:
        llm.engine.step()
    assert request.error is None
    llm.engine.check_integrity()


def test_an_aborted_request_lets_go(llm):
    request = llm._intake.request(PROMPT, PARAMS)
    llm.engine.add(request)
    while not request.sequences[0].num_output:
        llm.engine.step()
    assert holds(llm)["the"] == 1
    llm.engine.abort(request)
    while llm.engine.has_work:
        llm.engine.step()
    assert set(holds(llm).values()) == {0}
