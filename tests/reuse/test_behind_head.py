"""Chunks encoded behind the text in front of a prompt's first chunk."""

import pytest

from kvjax.request import Chunk
from kvjax.reuse import parse
from tests.reuse.prompts import FIRST, QUESTION, SECOND, SYSTEM, answer, assert_exact, fresh_llm

NOTHING_AGAIN = ("epic:k=0,head=true", "cacheblend:ratio=0,head=true", "cacheclip:ratio=0")


@pytest.mark.parametrize("spec", NOTHING_AGAIN)
def test_a_chunk_right_behind_the_head_is_exact_with_nothing_chosen_to_run_again(spec):
    report = assert_exact(spec, [SYSTEM, Chunk(FIRST), QUESTION]).reuse
    assert report.copied_tokens == len(FIRST)
    assert report.groups[-1].recomputed == 0


@pytest.mark.parametrize("name", ["epic", "cacheblend"])
def test_prompts_with_another_head_do_not_share_what_was_encoded_behind_it(name):
    llm = fresh_llm()
    spec = f"{name}:head=true"
    for head in (SYSTEM, "Be kind. ", ""):
        answer(llm, [head, Chunk(FIRST), Chunk(SECOND), QUESTION], spec)
    contexts = {variant.key.context for variant in llm.engine.chunks.store.of(None)}
    assert len(contexts) == 3
    assert "" in contexts


def test_dummies_and_the_head_exclude_each_other():
    with pytest.raises(ValueError, match="behind the head or behind"):
        parse("epic:k=0,sink=5,head=true")
