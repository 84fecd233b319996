import pytest

from kvjax.benchmarks import corpora
from kvjax.benchmarks.corpora import workloads
from tests.benchmarks.echo import build


def test_each_relay_output_continues_exactly_the_prompt_of_its_agent():
    corpus = build("relay")
    prompts = {f"{item.id}": "".join(item.prompt(lambda p: p.text)) for item in corpus.items}
    seen = 0
    for item in corpus.items:
        for passage in item.passages[1:]:
            assert passage.source == prompts[passage.id]
            seen += 1
    assert seen == 6 * len(corpus.items) // 4


def test_the_full_rag_workload_has_the_sharing_its_readme_states():
    corpus = workloads.rag("held_out", "full", 0)
    rows = [r for r in workloads._rows("w2_rag_shuffled_chunks") if r["type"] == "request"]
    uses = [c for row in rows for c in row["chunks"]]
    assert (len(rows), len(uses), len(set(uses))) == (155, 905, 200)
    assert len(corpus.items) + len(corpus.warm_up) == len(rows)


@pytest.mark.parametrize("size", corpora.SIZES)
def test_a_window_of_a_document_keeps_a_gold_answer(size):
    for item in build("document", size=size).items:
        text = item.passages[item.needs[0]].text.lower()
        assert any(answer.lower() in text for answer in item.answers)


@pytest.mark.parametrize("size", corpora.SIZES)
def test_a_rag_prompt_keeps_its_gold_passage_and_the_order(size):
    rows = {r["id"]: r for r in workloads._rows("w2_rag_shuffled_chunks") if "id" in r}
    for item in build("rag", size=size).items:
        row, ids = rows[item.id], [p.id for p in item.passages]
        assert ids[item.needs[0]] == row["gold_chunk"]
        assert ids == [c for c in row["chunks"] if c in ids]


def test_a_document_in_passages_is_the_whole_document():
    rows = [r for r in workloads._rows("w5_long_document_qa") if r["type"] == "document"]
    for row in rows:
        pieces = workloads.cut_lines(row["text"])
        assert "".join(pieces).rstrip("\n") == row["text"].rstrip("\n")
        assert all(len(piece) >= 600 for piece in pieces[:-1])
