import dataclasses
import itertools
import re

import pytest

from kvjax.benchmarks import corpora
from kvjax.benchmarks.corpora import (
    Generation,
    Item,
    Passage,
    agents,
    binding_templates,
    lookup,
    schema,
    solves,
    words,
)
from tests.benchmarks.echo import build, echo

SYNTHETIC = ("lookup", "binding", "agents", "schema")
COMMITTED = {  # of digests; fixed before the first strategy was measured
    ("lookup", "tuning", "small"): "7f4800f8c69b51e1",
    ("lookup", "tuning", "full"): "e933b14d284a9cfc",
    ("lookup", "held_out", "small"): "72c0546b7d843237",
    ("lookup", "held_out", "full"): "ccd681957b2172a3",
    ("binding", "tuning", "small"): "8684416c18e11082",
    ("binding", "tuning", "full"): "9633e652eb6b53a2",
    ("binding", "held_out", "small"): "6fc2cc35e37e5326",
    ("binding", "held_out", "full"): "f563fd741c53bc7b",
    ("agents", "tuning", "small"): "a39caf69707e420f",
    ("agents", "tuning", "full"): "0bdeec20e0db7296",
    ("agents", "held_out", "small"): "eabe7103eac9ecc8",
    ("agents", "held_out", "full"): "79ab412c74ef77dd",
    ("schema", "tuning", "small"): "955182c74d13245a",
    ("schema", "tuning", "full"): "d0b7c04cf4e74e0d",
    ("schema", "held_out", "small"): "8fb52d1884b62fdc",
    ("schema", "held_out", "full"): "568be3dd01cb91e2",
    ("rag", "held_out", "small"): "b3479dcf153f0e04",
    ("rag", "held_out", "full"): "9280a726d48e2586",
    ("relay", "held_out", "small"): "cc4bc91ef0c642bd",
    ("relay", "held_out", "full"): "6dc754fe2d704e09",
    ("document", "held_out", "small"): "aa73b23c95a69d21",
    ("document", "held_out", "full"): "38af7e76c162f3d1",
    ("sql", "held_out", "small"): "45cbe97f25437eea",
    ("sql", "held_out", "full"): "21e20ccbbe386fe1",
}


@pytest.fixture(scope="module", params=("tuning", "held_out"))
def binding(request):
    return build("binding", split=request.param)


@pytest.mark.parametrize(("name", "split", "size"), COMMITTED, ids=str)
def test_the_corpora_are_those_that_were_committed(name, split, size):
    assert build(name, split=split, size=size).digest[:16] == COMMITTED[name, split, size]


@pytest.mark.parametrize("name", SYNTHETIC)
def test_another_seed_is_another_corpus(name):
    assert build(name, seed=1).digest != build(name).digest


@pytest.mark.parametrize("name", corpora.CORPORA)
def test_ids_name_items_and_equal_passage_ids_are_equal_texts(name):
    corpus = build(name)
    items = corpus.items + corpus.warm_up
    assert len({item.id for item in items}) == len(items)
    passages = [p for item in items for p in item.passages]
    assert len({p.id for p in passages}) == len({(p.id, p.text) for p in passages})
    for item in items:
        assert len({p.id for p in item.passages}) == len(item.passages)


@pytest.mark.parametrize("name", SYNTHETIC)
@pytest.mark.parametrize(("size", "count"), [("small", 48), ("full", 200)])
def test_synthetic_corpora_have_48_and_200_items_and_20_before(name, size, count):
    corpus = build(name, size=size)
    assert (len(corpus.items), len(corpus.warm_up)) == (count, corpora.NUM_WARM_UP)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_the_splits_share_no_template_no_passage_and_no_question(name):
    tuning, held_out = build(name, split="tuning"), build(name, split="held_out")
    for what in (
        lambda item: {item.template},
        lambda item: {p.text for p in item.passages},
        lambda item: {item.question},
    ):
        a, b = (set().union(*map(what, c.items + c.warm_up)) for c in (tuning, held_out))
        assert a.isdisjoint(b)


@pytest.mark.parametrize(
    "templates",
    [lookup.TEMPLATES, binding_templates.TEMPLATES, schema.TEMPLATES, agents.ROLES,
     agents.WRITERS, agents.PROBLEMS],
)  # fmt: skip
def test_half_of_the_templates_are_held_out(templates):
    assert len(templates) % 2 == 0
    assert len(set(map(str, templates))) == len(templates)


@pytest.mark.parametrize("split", corpora.SPLITS)
def test_a_looked_up_fact_stands_in_one_passage_only(split):
    for item in build("lookup", split=split).items:
        (needed,) = item.needs
        lead = item.lead.rstrip()
        holders = [at for at, p in enumerate(item.passages) if lead in p.text]
        assert holders == [needed]
        assert f"{lead} {item.answer}." in item.passages[needed].text


def sentences(passage):
    """Sentences of a passage."""
    return re.split(r"(?<=\.) ", passage.text.strip())


def test_binding_needs_a_passage_that_names_the_person_and_the_next_that_holds_the_number(binding):
    for item in binding.items:
        define, use = item.needs
        assert use == define + 1
        person = named(item)
        assert [at for at, p in enumerate(item.passages) if person in p.text] == [define]
        assert [at for at, p in enumerate(item.passages) if item.answer in p.text] == [use]


def test_binding_offers_another_number_of_the_same_kind_under_another_person(binding):
    for item in binding.items:
        (template,) = (t for t in binding_templates.TEMPLATES if t.name == item.template)
        use = re.escape(template.use.format(number="#")).replace(r"\#", r"(\d+)")
        offered = [n for p in item.passages for n in re.findall(f"^{use}", p.text)]
        assert len(offered) == 2
        assert item.answer in offered
        assert offered[0][0] != offered[1][0]


def test_the_same_passage_answers_for_other_people_in_other_prompts(binding):
    owners: dict[str, set[str]] = {}
    for item in binding.items + binding.warm_up:
        owners.setdefault(item.passages[item.needs[1]].id, set()).add(named(item))
    assert sum(len(people) > 1 for people in owners.values()) >= 10


def named(item):
    """The person that the question of a binding item names."""
    (template,) = (t for t in binding_templates.TEMPLATES if t.name == item.template)
    pattern = re.escape(template.question).replace(r"\{person\}", "(.+)")
    ((person),) = re.findall(pattern, item.question)
    return person


@pytest.mark.parametrize("split", corpora.SPLITS)
def test_filler_says_no_number_and_no_name(split):
    corpus = build("lookup", split=split)
    names = set(words.FIRST_NAMES)
    for passage in {p for item in corpus.items for p in item.passages}:
        told = [s for s in sentences(passage) if re.search(r"\d", s) or names & set(s.split())]
        if any(re.search(r"\d", s) for s in told):
            assert len(told) == lookup.NUM_FACTS


@pytest.mark.parametrize("split", corpora.SPLITS)
def test_a_schema_question_needs_the_table_and_the_table_it_refers_to(split):
    for item in build("schema", split=split).items:
        parent, key = item.answer.split(".")
        ((child, link),) = re.findall(r"^The condition is (\w+)\.(\w+) =$", item.lead)
        holders = {
            "link": [at for at, p in enumerate(item.passages) if re.search(rf"\b{link}\b", p.text)],
            "key": [at for at, p in enumerate(item.passages) if re.search(rf"\b{key}\b", p.text)],
        }
        places = {p.id.rpartition(".")[2]: at for at, p in enumerate(item.passages)}
        assert holders == {"link": [places[child]], "key": [places[parent]]}
        assert set(item.needs) == {places[child], places[parent]}
        assert (places[child], places[parent]) in item.edges
        assert parent not in item.question


@pytest.mark.parametrize("name", ["schema", "sql"])
def test_foreign_keys_are_edges_without_cycles(name):
    for item in build(name).items:
        assert item.edges
        left = {p.id: set(p.parents) for p in item.passages}
        while left:  # tables whose parents are gone, or not there
            free = [table for table, parents in left.items() if not parents & left.keys()]
            assert free
            for table in free:
                del left[table]


def test_agents_of_every_role_read_the_same_messages():
    corpus = build("agents")
    by_problem: dict[str, list[Item]] = {}
    for item in corpus.items:
        by_problem.setdefault(item.passages[0].id, []).append(item)
    for group in by_problem.values():
        assert len({item.role for item in group}) == len(group) == 4
        assert len({frozenset(p.id for p in item.passages) for item in group}) == 1
    item = corpus.items[0]
    for message in item.passages[1:]:
        assert message.source is not None
        assert item.passages[0].text in message.source
        assert message.text == echo([message.source], 0)[0].text


def test_messages_are_generated_once_each_with_the_size_s_limit():
    asked = []

    def generate(prompts, max_tokens):
        asked.append((list(prompts), max_tokens))
        return echo(prompts, max_tokens)

    corpora.build("agents", generate=generate)
    ((prompts, most),) = asked
    assert len(set(prompts)) == len(prompts)
    assert most == corpora.SIZES["small"].message_tokens


def test_sharing_counts_uses_and_distinct_texts():
    a, b, c = (Passage(x, x) for x in "abc")
    item = build("lookup").items[0]
    items = [dataclasses.replace(item, passages=p) for p in ((a, b), (b, a), (b, c))]
    found = corpora.sharing(items)
    assert (found.uses, found.distinct, found.hit_rate) == (6, 3, 0.5)
    assert corpora.sharing([]).hit_rate == 0


LEAST_HIT_RATES = {
    "lookup": 0.7, "binding": 0.6, "agents": 0.7, "schema": 0.7, "relay": 0.6, "sql": 0.9,
}  # fmt: skip


@pytest.mark.parametrize(("name", "least"), LEAST_HIT_RATES.items())
def test_passages_come_again(name, least):
    assert corpora.sharing(build(name).items).hit_rate >= least


def test_prompt_parts_are_text_and_passages_in_order():
    item = build("agents").items[0]
    parts = item.prompt(lambda p: p)
    assert [p for p in parts if isinstance(p, Passage)] == list(item.passages)
    assert parts[0] == item.head
    assert parts[-1] == item.tail
    assert parts[2:5] == [item.passages[1], "\n", item.passages[2]]
    assert item.tail.endswith(f"<|im_start|>assistant\n{item.lead}")


@pytest.mark.parametrize(
    ("lead", "said", "right"),
    [
        ("is ", "4817. The", True),
        ("is ", "The 4817", False),
        ("is ", "48171", False),
        ("", "It is, 4817!", True),
        ("", "14817", False),
        ("", "", False),
    ],
)
def test_an_answer_counts_as_whole_words_and_at_once_after_a_lead(lead, said, right):
    item = dataclasses.replace(build("lookup").items[0], lead=lead, answers=("4817",))
    assert solves(item, said) is right


def test_without_a_gold_answer_nothing_is_solved_or_missed():
    item = dataclasses.replace(build("lookup").items[0], answers=())
    assert solves(item, "anything") is None


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"name": "lokup"}, "unknown corpus 'lokup'; there are lookup"),
        ({"name": "lookup", "split": "test"}, "got 'test'"),
        ({"name": "lookup", "size": "big"}, "got 'big'"),
        ({"name": "rag", "split": "tuning"}, "held_out only"),
        ({"name": "agents"}, "pass generate"),
    ],
)
def test_wrong_arguments_are_named(how, message):
    with pytest.raises(ValueError, match=message):
        corpora.build(**how)


@pytest.mark.model
@pytest.mark.parametrize("name", corpora.CORPORA)
def test_small_prompts_have_at_most_800_tokens(name, tokenizer):
    stand_in = tokenizer.encode("nine apples, " * 100, add_special_tokens=False)

    def longest(prompts, max_tokens):
        ids = tuple(stand_in[:max_tokens])
        return [Generation(tokenizer.decode(ids), ids) for _ in prompts]

    source = corpora.CORPORA[name]
    for split in corpora.SPLITS if source.has_splits else ("held_out",):
        corpus = corpora.build(name, split=split, generate=longest)
        for item in corpus.items + corpus.warm_up:
            parts = item.prompt(lambda p: p.text)
            assert sum(len(tokenizer.encode(p, add_special_tokens=False)) for p in parts) <= 800


@pytest.mark.model
@pytest.mark.parametrize("name", ["lookup", "binding"])
def test_full_passages_have_128_to_256_tokens_or_nearly(name, tokenizer):
    corpus = corpora.build(name, size="full")
    texts = {p.text for item in corpus.items for p in item.passages}
    lengths = sorted(len(tokenizer.encode(t, add_special_tokens=False)) for t in texts)
    assert lengths[0] >= 120
    assert lengths[-1] <= 256


@pytest.mark.model
def test_the_next_token_after_a_lead_is_the_answer_s_first(tokenizer):
    for name, split in itertools.product(("lookup", "binding"), corpora.SPLITS):
        for item in corpora.build(name, split=split).items:
            space = "" if item.lead.endswith(" ") else " "
            lead, whole = (
                tokenizer.encode(text, add_special_tokens=False)
                for text in (item.tail, f"{item.tail}{space}{item.answer}")
            )
            assert whole[: len(lead)] == lead


@pytest.fixture(scope="module")
def tokenizer(smollm2_path):
    from kvjax.models.checkpoint import open_checkpoint
    from kvjax.models.tokenizers import load_tokenizer

    return load_tokenizer(open_checkpoint(smollm2_path))
