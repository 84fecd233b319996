"""What strategies see of computed prompts: once each, with its KV, which they may keep."""

import dataclasses
from typing import Any, ClassVar

import numpy as np
import pytest

from kvjax import SamplingParams
from kvjax.request import Chunk
from kvjax.reuse.strategy import Observed, Strategy, Workbench
from tests.reuse.prompts import FIRST, QUESTION, SECOND, SYSTEM, fresh_llm

PROMPT = [SYSTEM, Chunk(FIRST), Chunk(SECOND), QUESTION]
LENGTH = len(SYSTEM + FIRST + SECOND + QUESTION)


@dataclasses.dataclass(frozen=True)
class Watching(Strategy):
    """Notes what it is shown, in a list of the test's."""

    name: ClassVar[str] = "watching"
    seen: tuple[Any, ...] = ()

    def observe(self, observed: Observed, bench: Workbench) -> None:
        kept = bench.keep(1)
        start, stop = (len(SYSTEM + FIRST), len(SYSTEM + FIRST + SECOND))
        edges = (0, len(SYSTEM), start, stop)
        (notes,) = self.seen
        notes.append(
            (observed, bench.read_prompt(0, observed.prompt.num_tokens), kept,
             None if kept is None else bench.read(kept), bench.attended(start, stop, edges))
        )  # fmt: skip


@pytest.fixture(scope="module")
def llm():
    return fresh_llm()


def watched(llm, **options: Any) -> list[Any]:
    """What was noted: the prompt as observed, its KV, chunk 1 as kept, its KV, its attention."""
    llm.reset_prefix_cache()
    llm.chunks.store.clear()
    notes: list[Any] = []
    params = SamplingParams(reuse=Watching((notes,)), temperature=0, **options)
    (out,) = llm.generate([PROMPT], params)
    assert out.error is None
    llm.engine.check_integrity()
    return notes


@pytest.mark.parametrize("options", [{"max_tokens": 1}, {"max_tokens": 5}, {"n": 3}], ids=str)
def test_a_prompt_is_shown_once_when_its_last_token_is_computed(llm, options):
    ((observed, *_),) = watched(llm, **options)
    assert observed.exact
    assert observed.prompt.num_tokens == LENGTH
    assert observed.used == ()
    assert observed.fates.shape == (1, LENGTH)


def test_an_opened_prompt_is_shown_and_its_kv_is_the_branchs(llm):
    llm.reset_prefix_cache()
    notes: list[Any] = []
    with llm.open(PROMPT, SamplingParams(reuse=Watching((notes,)))) as branch:
        ((_, (k, v), *_),) = notes
        for layer, kv in enumerate(branch.kv()):
            np.testing.assert_allclose(k[layer], kv.k, atol=1e-6)
            assert kv.v is not None
            np.testing.assert_array_equal(v[layer], kv.v)


def test_a_kept_chunk_is_what_the_prompt_holds_with_keys_turned_back(llm):
    ((observed, (_, v), kept, (alone_k, alone_v), _),) = watched(llm, max_tokens=1)
    start = len(SYSTEM + FIRST)
    assert kept.context_ids == observed.prompt.tokens[:start]
    assert (kept.base, kept.lineage) == (start, "exact")
    np.testing.assert_array_equal(alone_v, v[:, start : start + len(SECOND)])
    llm.put_chunks([SECOND], strategy="naive")
    (canonical,) = (x for x in llm.chunks.store if x.key.context == "")
    k, _ = llm.chunks.read(canonical)
    np.testing.assert_allclose(alone_k[0], k[0], atol=1e-4)  # layer 0 has no context
    assert np.abs(alone_k[1] - k[1]).max() > 0.01


def test_attention_over_all_parts_in_front_and_within_is_one(llm):
    ((*_, sums),) = watched(llm, max_tokens=1)
    assert sums.shape == (2, len(SECOND), 3)
    np.testing.assert_allclose(sums.sum(axis=2), 1, rtol=1e-5)
    assert sums.min() > 0


def test_looking_at_attention_changes_no_kv_and_is_counted(llm):
    ((_, before, *_),) = watched(llm, max_tokens=1)
    llm.reset_prefix_cache()
    with llm.open(PROMPT) as branch:
        for layer, kv in enumerate(branch.kv()):
            np.testing.assert_array_equal(before[1][layer], kv.v)
    notes: list[Any] = []
    params = SamplingParams(reuse=Watching((notes,)), max_tokens=1)
    (out,) = llm.generate([PROMPT], params)
    assert out.reuse.kept_layer_tokens == 2 * len(SECOND)


def test_a_prompt_that_is_not_to_be_learned_from_is_not_shown(llm):
    assert watched(llm, max_tokens=1, extra_args={"learn": False}) == []
    assert len(watched(llm, max_tokens=1, extra_args={"learn": True})) == 1


def test_a_prompt_whose_pages_are_taken_before_its_step_is_committed_is_shown_later(llm):
    llm.reset_prefix_cache()
    notes: list[Any] = []
    request = llm._intake.request(PROMPT, SamplingParams(reuse=Watching((notes,)), max_tokens=6))
    (sequence,) = request.sequences
    llm.engine.add(request)
    while sequence.num_computed < sequence.num_prompt:
        llm.engine.step()
    assert not notes  # planned and dispatched, not yet committed
    llm.engine.scheduler.preempt(sequence)
    llm.reset_prefix_cache()
    while not request.finished:
        llm.engine.step()
    ((observed, *_),) = notes
    assert observed.prompt.num_tokens == LENGTH
    llm.engine.check_integrity()
