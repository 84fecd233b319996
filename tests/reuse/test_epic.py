"""EPIC: the first tokens of every chunk are run again, or nothing is behind dummies."""

from typing import Any

import numpy as np
import pytest

from kvjax import Chunk
from kvjax.reuse import parse
from kvjax.reuse.report import Fate
from tests.reuse.prompts import FIRST, QUESTION, SECOND, SYSTEM, answer, fresh_llm, full_prefill

PROMPT = [SYSTEM, Chunk(FIRST), Chunk(SECOND), QUESTION]


def rows(report: Any) -> list[int]:
    return np.flatnonzero((report.fates == Fate.RECOMPUTED).all(axis=0)).tolist()


@pytest.mark.parametrize("k", [0, 1, 4, 64])
def test_the_first_k_tokens_of_every_chunk_are_run_again(k):
    llm, start = fresh_llm(), len(SYSTEM)
    report = answer(llm, PROMPT, f"epic:k={k}").reuse
    first = range(start, start + min(k, len(FIRST)))
    second = range(start + len(FIRST), start + len(FIRST) + min(k, len(SECOND)))
    assert rows(report) == [*first, *second]
    report = answer(llm, [Chunk(FIRST), Chunk(SECOND), QUESTION], f"epic:k={k}").reuse
    assert rows(report) == [row - start for row in second]  # what begins a prompt is its own sink
    assert (report.fates[:, : len(FIRST)] == Fate.EXACT).all()


def test_dummies_stand_in_front_of_chunks_when_they_are_encoded_and_are_dropped():
    llm = fresh_llm()
    out = answer(llm, PROMPT, "epic:k=0,sink=7,dummies=2")
    assert rows(out.reuse) == []
    assert out.reuse.shifted == len(FIRST + SECOND)
    behind = [variant.context_ids for variant in llm.engine.chunks.store]
    assert behind == [(7, 7, 7)] * 2
    assert [variant.base for variant in llm.engine.chunks.store] == [3, 3]


def test_a_chunk_that_begins_the_prompt_needs_no_dummies():
    """Its own first token is the sink there, so it is exact as it was encoded alone."""
    llm, prompt = fresh_llm(), [Chunk(FIRST), QUESTION]
    full = full_prefill(llm, prompt)
    out = answer(llm, prompt, "epic:k=0,sink=7")
    assert out.reuse.exact == len(FIRST)
    assert out.outputs[0].token_ids == full.outputs[0].token_ids


@pytest.mark.parametrize("options", ["k=-1", "sink=-2", "dummies=-1", "k=a"])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=options.split("=")[0]):
        parse(f"epic:{options}")
