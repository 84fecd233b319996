"""TableCache: tables behind the tables they refer to, whatever the order a prompt has them in."""

import pytest

from kvjax import LLM, SamplingParams
from kvjax.cache.chunks import tokens_hash
from kvjax.request import Chunk
from kvjax.reuse import TableCache, parse
from kvjax.reuse.strategy import Document, contexts
from tests.reuse.prompts import (
    QUESTION,
    SYSTEM,
    answer,
    distance,
    fresh_llm,
    full_prefill,
    prompts,
)
from tests.tiny_model import tiny

REGION = "CREATE TABLE region (r INT);"
NATION = "CREATE TABLE nation (n INT, r INT REFERENCES region);"
CLIENT = "CREATE TABLE client (n INT REFERENCES nation);"
SCHEMA = [CLIENT, NATION, REGION]  # as they come; topologically it is the other way round


def ids(text):
    return tuple(ord(c) for c in text)


def documents(*texts, parents=None):
    told = parents or [None] * len(texts)
    return [Document(ids(t), t, p) for t, p in zip(texts, told, strict=True)]


def test_a_table_is_encoded_behind_the_tables_it_refers_to_and_keeps_its_own_kv():
    llm = fresh_llm()
    assert all(put.stored for put in llm.chunks.put(SCHEMA, strategy="tablecache"))
    held = {bytes(v.tokens.tolist()).decode(): v for v in llm.engine.chunks.store}
    assert {text: v.context_ids for text, v in held.items()} == {
        REGION: (),
        NATION: ids(REGION),
        CLIENT: ids(NATION),
    }
    assert held[CLIENT].context_chunks == (tokens_hash(ids(NATION)),)
    assert held[CLIENT].base == len(NATION)


def test_a_table_with_several_parents_is_behind_them_referenced_ones_first():
    both = "CREATE TABLE sale (n INT REFERENCES nation, r INT REFERENCES region);"
    corpus = documents(both, NATION, REGION)
    assert contexts(TableCache(), corpus, corpus)[0].tokens == ids(REGION + NATION)
    fits = TableCache(max_context=len(NATION))
    assert contexts(fits, corpus, corpus)[0].tokens == ids(REGION)


def test_what_the_caller_says_of_parents_counts_before_what_the_texts_say():
    corpus = documents(CLIENT, NATION, REGION, parents=[(2,), (), ()])
    assert TableCache().related(corpus) == [(2,), (), ()]
    llm = fresh_llm()
    with pytest.raises(ValueError, match="2 parents for 3 documents"):
        llm.chunks.put(SCHEMA, strategy="tablecache", parents=[(), ()])
    with pytest.raises(ValueError, match="document 0 refers to document 9"):
        llm.chunks.put(SCHEMA, strategy="tablecache", parents=[(9,), (), ()])


def test_random_parents_are_as_many_others():
    corpus = documents(*SCHEMA, *(f"CREATE TABLE t{i} (a INT);" for i in range(5)))
    real = TableCache().related(corpus)
    drawn = TableCache(parents="random").related(corpus)
    assert [len(mine) for mine in drawn] == [len(mine) for mine in real]
    assert not any(set(a) & set(b) for a, b in zip(real, drawn, strict=True))
    assert drawn == TableCache(parents="random").related(corpus)
    assert TableCache(parents="none").related(corpus) == [()] * len(corpus)


def test_tables_are_found_in_any_order():
    llm = fresh_llm()
    llm.chunks.put(SCHEMA, strategy="tablecache")
    before = len(llm.engine.chunks.store)
    for order in (SCHEMA, SCHEMA[::-1], [NATION, CLIENT, REGION]):
        llm.reset_prefix_cache()
        report = answer(llm, [SYSTEM, *map(Chunk, order), QUESTION], "tablecache").reuse
        assert report.shifted == sum(map(len, SCHEMA))
        assert report.computed == len(SYSTEM + QUESTION)
    assert len(llm.engine.chunks.store) == before  # nothing was encoded anew


def test_the_variant_whose_context_the_prompt_has_serves_and_else_the_table_alone():
    llm, strategy = fresh_llm(), TableCache()
    llm.chunks.put(SCHEMA, strategy=strategy)

    def base(*tables):
        llm.reset_prefix_cache()
        answer(llm, [SYSTEM, *map(Chunk, tables), QUESTION], strategy)
        (prompt,) = seen
        seen.clear()
        variant = strategy.look_up(prompt, 0, llm.engine.chunks.store)
        assert variant is not None
        return variant.base

    seen = []
    chunks, assembled = llm.engine.chunks, llm.engine.chunks.prompt

    def prompt(*arguments):
        seen[:] = [assembled(*arguments)]
        return seen[0]

    chunks.prompt = prompt
    try:
        assert base(CLIENT, NATION) == len(NATION)
        assert base(CLIENT, REGION) == 0  # encoded alone by now: nation is not in this prompt
        changed = NATION.replace("n INT", "number INT")
        assert base(CLIENT, changed) == 0  # a schema that changed
    finally:
        del chunks.prompt


def test_the_control_does_not_use_what_foreign_keys_made():
    llm = fresh_llm()
    llm.chunks.put(SCHEMA, strategy="tablecache")
    report = answer(llm, [SYSTEM, *map(Chunk, SCHEMA), QUESTION], "tablecache:parents=none").reuse
    assert report.shifted == sum(map(len, SCHEMA))
    assert sum(v.base == 0 for v in llm.engine.chunks.store) == 3


def test_tables_in_the_order_they_were_encoded_in_are_exact():
    """Then what is stored is what a full prefill computes; alone it is not."""
    llm = fresh_llm()
    prompt = [Chunk(REGION), Chunk(NATION), QUESTION]
    wanted = full_prefill(llm, prompt)
    llm.chunks.put([REGION, NATION], strategy="tablecache")
    llm.reset_prefix_cache()
    out = answer(llm, prompt, "tablecache")
    assert out.reuse.exact == len(REGION + NATION)
    assert distance(out, wanted) <= 1e-4
    llm.reset_prefix_cache()
    assert distance(answer(llm, prompt, "naive"), wanted) > 1e-4


@pytest.mark.parametrize("name", prompts())
def test_every_arrangement_is_served_and_asking_exactly_afterwards_is_cold(name):
    llm, prompt = fresh_llm(), prompts()[name]
    wanted = full_prefill(llm, prompt)
    out = answer(llm, prompt, "tablecache")
    assert out.reuse.recomputed == 0
    assert distance(answer(llm, prompt), wanted) == 0


def test_a_batch_is_queued_by_tables_and_answered_in_its_own_order():
    llm = tiny(LLM, fresh=True, num_pages=128, max_model_len=256, max_num_seqs=1)
    a, b = Chunk(CLIENT), Chunk(REGION)
    batch = [[SYSTEM, x, f"question {n}"] for n, x in enumerate((a, b, a, b))]
    started = []
    start = llm.engine.scheduler._start
    llm.engine.scheduler._start = lambda s, step: (started.append(s.request), start(s, step))[1]
    params = SamplingParams(temperature=0, max_tokens=2, reuse="tablecache")
    outs = llm.generate(batch, params)
    served = [request for request in started if request.chunk_spans]
    places = [int(chr(request.prompt_ids[-1])) for request in served]
    assert places in ([0, 2, 1, 3], [1, 3, 0, 2])
    assert [chr(out.prompt_token_ids[-1]) for out in outs] == ["0", "1", "2", "3"]


def test_options_are_validated():
    assert parse("tablecache:parents=random,max_context=9") == TableCache("random", 9)
    with pytest.raises(ValueError, match="parents must be one of"):
        TableCache(parents="nearest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_context must be an integer of at least 0"):
        TableCache(max_context=-1)
