"""W2, W3, W5, W6: request sets of real and hand-written text, shipped in `benchmarks/data`.

They are reported beside the synthetic corpora and never tuned on, so they have no tuning split.
Their texts, licences and makers are in `benchmarks/data/workloads/README.md`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kvjax.benchmarks.corpora.item import (
    NUM_WARM_UP,
    SIZES,
    Corpus,
    Generate,
    Item,
    Passage,
)

FOLDER = Path(__file__).parent.parent / "data" / "workloads"
_MIN_PASSAGE_CHARS = 600  # lines of a document are joined up to this, about 140 tokens
T = TypeVar("T")


def rag(split: str, size: str, seed: int) -> Corpus:
    """W2: passages in random order, a question, gold answers; `full` keeps every passage."""
    _check(split)
    rows = list(_rows("w2_rag_shuffled_chunks"))
    chunks = {row["chunk_id"]: row for row in rows if row["type"] == "chunk"}
    limit = SIZES[size].rag_tokens
    items: list[Item] = []
    for row in rows:
        if row["type"] != "request":
            continue
        kept = _kept(row["chunks"], row["gold_chunk"], limit, chunks)
        items.append(
            Item(
                id=row["id"],
                corpus="rag",
                template=row["scenario"],
                system="Answer the question in a few words, from the notes below.",
                passages=tuple(Passage(c, chunks[c]["text"] + "\n\n") for c in kept),
                question=row["question"],
                answers=tuple(row["answers"]),
                needs=(kept.index(row["gold_chunk"]),),
            )
        )
    return _corpus("rag", items, SIZES[size].items)


def document(split: str, size: str, seed: int) -> Corpus:
    """W5: one long document cut at its lines, a question; `small` takes a window of it."""
    _check(split)
    rows = list(_rows("w5_long_document_qa"))
    cut = {r["doc_id"]: cut_lines(r["text"]) for r in rows if r["type"] == "document"}
    items: list[Item] = []
    for row in rows:
        if row["type"] != "request":
            continue
        texts = cut[row["doc_id"]]
        gold = [at for at, text in enumerate(texts) if _mentions(text, row["answers"])]
        first, stop = _window(texts, gold[0], SIZES[size].text_chars)
        items.append(
            Item(
                id=row["id"],
                corpus="document",
                template=row["doc_id"],
                system="Answer the question in a few words, from the document below.",
                passages=tuple(
                    Passage(f"{row['doc_id']}#{at}", texts[at]) for at in range(first, stop)
                ),
                question=row["question"],
                answers=tuple(row["answers"]),
                needs=(gold[0] - first,),
            )
        )
    return _corpus("document", items, SIZES[size].items)


def sql(split: str, size: str, seed: int) -> Corpus:
    """W6: two schemas, each in three orders of its tables; the gold answer is the whole query."""
    _check(split)
    rows = list(_rows("w6_text_to_sql"))
    tables = {row["db"]: _tables(row["db"], row["ddl"]) for row in rows if row["type"] == "schema"}
    items = [
        Item(
            id=row["id"],
            corpus="sql",
            template=row["db"],
            system="Write one SQL query that answers the question, for the tables below.",
            passages=tuple(tables[row["db"]][at] for at in row["table_order"]),
            question=row["question"],
            lead="SELECT",
            answers=(row["gold_sql"].removeprefix("SELECT "),),
        )
        for row in rows
        if row["type"] == "request"
    ]
    return _corpus("sql", items, SIZES[size].items)


def relay(split: str, size: str, seed: int, generate: Generate) -> Corpus:
    """W3: four agents in turn read an article and what the agents before them wrote.

    The role's second sentence is asked again at the end, where the model's turn begins. There is no
    gold answer. Each agent's output is generated after exactly the prompt of its own item.
    """
    _check(split)
    shape = SIZES[size]
    rows = list(_rows("w3_multi_agent_relay"))
    articles = [Passage(row["id"], _leading(row["article"], shape.text_chars)) for row in rows]
    outputs: list[dict[str, Passage]] = [{} for _ in rows]
    items: list[list[Item]] = [[] for _ in rows]
    for turn in range(len(rows[0]["steps"])):
        for at, row in enumerate(rows):
            items[at].append(_step(row, row["steps"][turn], articles[at], outputs[at]))
        prompts = ["".join(mine[turn].prompt(lambda p: p.text)) for mine in items]
        most = min(shape.message_tokens, *(row["steps"][turn]["max_new_tokens"] for row in rows))
        made = generate(prompts, most) if turn + 1 < len(rows[0]["steps"]) else ()
        for at, generation in enumerate(made):
            role = items[at][turn].role
            assert role is not None
            outputs[at][role] = Passage(
                f"{rows[at]['id']}.{role}",
                generation.text,
                source=prompts[at],
                token_ids=tuple(generation.token_ids),
            )
    return _corpus("relay", [item for mine in items for item in mine], shape.items, groups=4)


def cut_lines(text: str) -> list[str]:
    """Pieces of whole lines, each of 600 characters or more but the last; nothing is lost."""
    pieces: list[str] = []
    for line in text.splitlines(keepends=True):
        if pieces and len(pieces[-1]) < _MIN_PASSAGE_CHARS:
            pieces[-1] += line
        else:
            pieces.append(line)
    if not pieces[-1].endswith("\n"):
        pieces[-1] += "\n"
    return pieces


def _step(
    row: dict[str, Any], step: dict[str, Any], article: Passage, outputs: dict[str, Passage]
) -> Item:
    role = next(s["text"] for s in step["segments"] if s["kind"] == "role")
    earlier = [outputs[s["agent"]] for s in step["segments"] if s["kind"] == "output_of"]
    return Item(
        id=f"{row['id']}.{step['agent']}",
        corpus="relay",
        template=step["agent"],
        system=role,
        passages=(article, *earlier),
        question=role.partition(". ")[2],
        answers=(),
        role=step["agent"],
    )


def _tables(db: str, ddl: Sequence[str]) -> list[Passage]:
    found: list[Passage] = []
    for text in ddl:
        name = text.split()[2]
        parents = dict.fromkeys(re.findall(r"REFERENCES (\w+)", text))
        ids = tuple(f"{db}.{parent}" for parent in parents if parent != name)
        found.append(Passage(f"{db}.{name}", text + "\n", parents=ids))
    return found


def _kept(
    ids: Sequence[str], gold: str, limit: int | None, chunks: dict[str, dict[str, Any]]
) -> list[str]:
    """The ids in their order, without those after which `limit` tokens would be passed."""
    if limit is None:
        return list(ids)
    kept, total = {gold}, chunks[gold]["tokens"]
    for name in ids:
        if name not in kept and total + chunks[name]["tokens"] <= limit:
            kept.add(name)
            total += chunks[name]["tokens"]
    return [name for name in ids if name in kept]


def _window(texts: Sequence[str], needed: int, limit: int | None) -> tuple[int, int]:
    """A span of texts around the needed one, grown to both sides in turn up to `limit` chars."""
    if limit is None:
        return 0, len(texts)
    first, stop = needed, needed + 1
    size, grew = len(texts[needed]), True
    while grew:
        grew = False
        if first > 0 and size + len(texts[first - 1]) <= limit:
            first, size, grew = first - 1, size + len(texts[first - 1]), True
        if stop < len(texts) and size + len(texts[stop]) <= limit:
            stop, size, grew = stop + 1, size + len(texts[stop]), True
    return first, stop


def _leading(text: str, limit: int | None) -> str:
    """Whole leading paragraphs of at most `limit` characters, at least one."""
    paragraphs = text.split("\n\n")
    while limit is not None and len(paragraphs) > 1 and len("\n\n".join(paragraphs)) > limit:
        paragraphs.pop()
    return "\n\n".join(paragraphs) + "\n\n"


def _mentions(text: str, answers: Sequence[str]) -> bool:
    return any(answer.lower() in text.lower() for answer in answers)


def _corpus(name: str, items: Sequence[Item], count: int, groups: int = 1) -> Corpus:
    """`count` items spread evenly over all, the warm-up over the rest; `groups` stay together."""
    together = [tuple(items[at : at + groups]) for at in range(0, len(items), groups)]
    spare = max(len(together) - -(-NUM_WARM_UP // groups), 1)
    judged = _spread(together, min(count // groups, spare))
    rest = [group for group in together if group not in judged]
    warm_up = _spread(rest, min(NUM_WARM_UP // groups, len(rest)))
    return Corpus(name, tuple(i for g in judged for i in g), tuple(i for g in warm_up for i in g))


def _spread(values: Sequence[T], count: int) -> list[T]:
    return [values[at * len(values) // count] for at in range(count)]


def _check(split: str) -> None:
    if split != "held_out":
        raise ValueError(f"workloads have the split held_out only, got {split!r}")


def _rows(name: str) -> Iterator[dict[str, Any]]:
    with (FOLDER / f"{name}.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
