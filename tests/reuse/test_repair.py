"""KVShare's repair in decoding: which rows run again between two steps, whose KV that changes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import LLM, SamplingParams
from kvjax.request import Chunk
from kvjax.reuse import parse
from kvjax.reuse.repair import Repair, stage_repair
from kvjax.reuse.scores import SCORES
from tests.reuse.prompts import (
    FIRST,
    QUESTION,
    SECOND,
    answer,
    distance,
    fresh_llm,
    full_prefill,
)
from tests.reuse.test_attention_scores import TOKENS, layer
from tests.tiny_model import tiny

PAGE = "You are so terse"  # 16 letters: what is exact ends with a page, and none is left alone
PROMPT = [PAGE, Chunk(FIRST), Chunk(SECOND), QUESTION]
REUSED = len(FIRST + SECOND)
SPEC = "kvshare:ratio=0.1,check_layer=0,repair=3"
PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, reuse=SPEC)


def test_a_new_token_scores_by_its_attention_times_the_distance_that_was_found():
    weights = jnp.zeros(TOKENS).at[jnp.array([3, 9])].set(jnp.array([2.0, 5.0]))
    seen = layer([3, 9, 16, 17], favourite=3)
    attention = SCORES["question_attention"](seen)
    scores = SCORES["observed_value_distance"](dataclasses.replace(seen, weights=weights))
    np.testing.assert_allclose(scores, attention * weights, rtol=1e-6)
    assert np.argmax(scores) == 3


def test_the_score_of_a_prompt_is_its_attention_times_what_is_kept_for_decoding():
    seen = layer([3, 9, 16, 17], value_change={3: 0.5, 9: -2.0})
    kept, both = SCORES["value_distance"](seen), SCORES["attention_value_deviation"](seen)
    everyone = dataclasses.replace(seen, question=jnp.ones_like(seen.question))
    np.testing.assert_allclose(both, SCORES["question_attention"](everyone) * kept, rtol=1e-5)


def a_repair(**changes):
    rows = np.array([4, 5, 20, 40], np.int32)
    return Repair(rows, np.array([1, 2, 3, 4], np.float32), 0, 3, 2, **changes)


def test_pages_that_others_use_are_left_alone():
    repair = a_repair()
    assert repair.plan(60, [7, 8, 9, 6], 16, lambda page: 2 if page == 8 else 1)
    assert repair.eligible is not None
    assert repair.eligible.tolist() == [True, True, False, True]
    assert not repair.plan(61, [7, 8, 9, 6], 16, lambda page: 2)


def test_a_repair_is_due_once_for_every_token_and_only_while_something_is_left():
    repair = a_repair()
    assert not repair.due(50, num_prompt=50)  # nothing was drawn yet
    assert repair.due(51, num_prompt=50)
    repair.plan(51, [0, 1, 2, 3], 16, lambda page: 1)
    assert not repair.due(51, num_prompt=50)
    assert repair.due(52, num_prompt=50)
    repair.ran(np.array([5, 40, -1]))
    assert repair.rows.tolist() == [4, 20]
    assert repair.distance.tolist() == [1, 3]
    repair.ran(np.array([4, 20]))
    assert not repair.due(60, num_prompt=50)


@dataclasses.dataclass
class Decoding:
    tokens: list[int]
    page_ids: list[int]
    num_computed: int
    repair: Repair


def test_a_repair_runs_the_newest_known_token_and_then_the_best_of_the_rows():
    repair = a_repair()
    repair.plan(52, [3, 2, 1, 0], 16, lambda page: 1)
    shape, batch = stage_repair(Decoding(list(range(51)), [3, 2, 1, 0], 52, repair), 16, 8)
    assert [(s.l0, s.l1, s.chooses) for s in shape.stages] == [(0, 1, False), (0, 2, True)]
    assert batch.indices[:6].tolist() == [4, 5, 20, 40, 50, -1]  # token 51 is on the device
    assert batch.tokens[:5].tolist() == [4, 5, 20, 40, 50]
    assert batch.question.nonzero()[0].tolist() == [4]
    assert batch.blended.nonzero()[0].tolist() == [0, 1, 2, 3]
    assert batch.rows[0].tolist() == [4, -1, -1, -1]
    assert batch.counts.tolist() == [0, 3]
    assert batch.num_tokens == 51


def kv_of(llm, sequence, stop):
    at = np.arange(stop)
    slots = np.asarray(sequence.page_ids)[at // 16] * 16 + at % 16
    return llm.engine.runner.read(slots, 0)


def test_running_all_rows_again_at_once_makes_the_prompts_kv_that_of_a_full_prefill():
    """No text stands behind the chunks, so that nothing keeps what was computed from stored KV."""
    llm, prompt = fresh_llm(), [PAGE, Chunk(FIRST), Chunk(SECOND)]
    with llm.open(prompt) as branch:
        wanted = branch.kv()
    llm.reset_prefix_cache()
    spec = "kvshare:ratio=0,check_layer=0,repair=200"
    params = dataclasses.replace(PARAMS, reuse=spec)
    answer(llm, prompt, "naive")
    llm.reset_prefix_cache()
    request = llm._intake.request(prompt, params)
    (sequence,) = request.sequences
    llm.engine.add(request)
    before = after = None
    stop = len(request.prompt_ids) - 1
    while not request.finished:
        llm.engine.step()
        if sequence.repair is not None and before is None:
            before = kv_of(llm, sequence, stop)
        elif sequence.repair is not None and not len(sequence.repair.rows) and after is None:
            after = kv_of(llm, sequence, stop)
    assert before is not None
    assert after is not None
    for number, full in enumerate(wanted):
        np.testing.assert_allclose(after[0][number], full.k[:stop], atol=1e-4)
        assert full.v is not None
        np.testing.assert_allclose(after[1][number], full.v[:stop], atol=1e-4)
    assert np.abs(before[0][1] - wanted[1].k[:stop]).max() > 1e-3
    assert request.report.repaired_tokens == REUSED - 1


def test_three_rows_run_again_between_two_steps_while_there_are_any():
    llm = fresh_llm()
    (out,) = llm.generate([PROMPT], PARAMS)
    assert PARAMS.max_tokens is not None
    steps = PARAMS.max_tokens - 1
    assert 3 * (steps - 1) <= out.reuse.repaired_tokens <= 3 * steps
    llm.reset_prefix_cache()
    many = dataclasses.replace(PARAMS, max_tokens=30)
    (out,) = llm.generate([PROMPT], many)
    assert out.reuse.repaired_tokens == REUSED - int(0.1 * REUSED)
    llm.engine.check_integrity()


def test_stored_chunks_stay_bitwise_what_they_are_and_the_same_request_gives_the_same():
    llm = fresh_llm()
    first = answer(llm, PROMPT, SPEC)
    held = {v.key: llm.engine.chunks.read(v) for v in llm.engine.chunks.store}
    llm.reset_prefix_cache()
    second = answer(llm, PROMPT, SPEC)
    assert distance(first, second) == 0
    for variant in llm.engine.chunks.store:
        for one, other in zip(llm.engine.chunks.read(variant), held[variant.key], strict=True):
            np.testing.assert_array_equal(one, other)


def test_repair_changes_what_is_drawn_from_the_second_token_on():
    llm = fresh_llm()
    plain = answer(llm, PROMPT, SPEC.replace("repair=3", "repair=0"))
    llm.reset_prefix_cache()
    repaired = answer(llm, PROMPT, SPEC)
    one, other = plain.outputs[0].logprobs, repaired.outputs[0].logprobs
    assert {t: e.logprob for t, e in one[0].items()} == {t: e.logprob for t, e in other[0].items()}
    assert {t: e.logprob for t, e in one[3].items()} != {t: e.logprob for t, e in other[3].items()}


def test_repaired_kv_is_found_by_nobody():
    llm = fresh_llm()
    wanted = full_prefill(llm, PROMPT)
    answer(llm, PROMPT, SPEC)
    again = answer(llm, PROMPT, SPEC)
    assert again.reuse.run_layer_tokens > 2  # not found whole
    assert distance(answer(llm, PROMPT), wanted) == 0


def test_branches_that_share_a_prompt_are_not_repaired():
    llm = fresh_llm()
    (out,) = llm.generate([PROMPT], dataclasses.replace(PARAMS, n=2))
    assert out.reuse.repaired_tokens == 0
    assert len({completion.token_ids for completion in out.outputs}) == 1
    llm.engine.check_integrity()


@pytest.mark.parametrize("overlap", [True, False])
def test_repair_goes_on_beside_other_requests_and_after_preemption(overlap):
    llm = tiny(LLM, fresh=True, num_pages=128, max_model_len=256, overlap=overlap)
    wanted = llm.generate(["an ordinary prompt"], dataclasses.replace(PARAMS, reuse=None))[0]
    llm.reset_prefix_cache()
    requests = [
        llm._intake.request(PROMPT, PARAMS),
        llm._intake.request("an ordinary prompt", dataclasses.replace(PARAMS, reuse=None)),
        llm._intake.request([PAGE, Chunk(SECOND), QUESTION], PARAMS),
    ]
    (sequence,) = requests[0].sequences
    for request in requests:
        llm.engine.add(request)
    preempted = False
    while not all(request.finished for request in requests):
        llm.engine.step()
        if sequence.num_output == 3 and not preempted:
            llm.engine.scheduler.preempt(sequence)
            preempted = True
    assert preempted
    assert [r.sequences[0].num_output for r in requests] == [8, 8, 8]
    assert requests[1].sequences[0].output_ids == wanted.outputs[0].token_ids
    assert requests[2].report.repaired_tokens > 0
    llm.engine.check_integrity()


def test_the_option_is_validated():
    assert parse("kvshare:repair=3").repair == 3
    with pytest.raises(ValueError, match="repair must be an integer of at least 0"):
        parse("kvshare:repair=-1")
