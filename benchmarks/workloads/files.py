"""The seven request sets of `data/workloads`, as plain prompts that any engine takes.

Their texts, licences and makers are in `data/workloads/README.md`. Lengths of answers are those of
the files; `num_prompts` takes the first requests (whole conversations and relays).
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kvjax.benchmarks.workloads import Options, Part, Request

FOLDER = Path(__file__).parent.parent / "data" / "workloads"
_ANSWER = "\n\nAssistant:"


def system_prompt(o: Options) -> Sequence[Request]:
    """W1: four tool catalogues as system prompts, 68 user requests."""
    systems, rows = _split("w1_shared_system_prompt", "prefix", "prefix_id", "system")
    return [
        Request((_text(systems[row["prefix_id"]]), _user(row["user"])), row["max_new_tokens"])
        for row in rows[: o.num_prompts]
    ]


def rag(o: Options) -> Sequence[Request]:
    """W2: up to six passages in random order, then a question."""
    passages, rows = _split("w2_rag_shuffled_chunks", "chunk", "chunk_id", "text")
    task = _text("Answer the question in a few words, from the notes below.\n\n")
    found = []
    for row in rows[: o.num_prompts]:
        notes = (Part(passages[c] + "\n\n", passage=True) for c in row["chunks"])
        found.append(Request((task, *notes, _user(row["question"])), row["max_new_tokens"]))
    return found


def relay(o: Options) -> Sequence[Request]:
    """W3: four agents read an article and what the agents before them wrote."""
    found: list[Request] = []
    for row in _rows("w3_multi_agent_relay"):
        if o.num_prompts is not None and len(found) + len(row["steps"]) > o.num_prompts and found:
            break
        wrote: dict[str, int] = {}
        for step in row["steps"]:
            parts = [p for s in step["segments"] for p in _segment(s, row["article"], wrote)]
            found.append(Request((*parts, Part(_ANSWER)), step["max_new_tokens"]))
            wrote[step["agent"]] = len(found) - 1
    return found


def parallel_sampling(o: Options) -> Sequence[Request]:
    """W4: sixteen prompts, sixteen samples of each."""
    rows = list(_rows("w4_parallel_sampling_n16"))[: o.num_prompts]
    return [Request((_text(r["prompt"]),), r["max_new_tokens"], n=r["n"]) for r in rows]


def document_qa(o: Options) -> Sequence[Request]:
    """W5: a long document, then one of many questions about it."""
    documents, rows = _split("w5_long_document_qa", "document", "doc_id", "text")
    task = _text("Answer the question in a few words, from the document below.\n\n")
    return [
        Request(
            (task, Part(documents[row["doc_id"]], passage=True), _user(row["question"])),
            row["max_new_tokens"],
        )
        for row in rows[: o.num_prompts]
    ]


def text_to_sql(o: Options) -> Sequence[Request]:
    """W6: the tables that a question needs in three orders, then the question."""
    schemas, rows = _split("w6_text_to_sql", "schema", "db", "ddl")
    task = _text("Write one SQL query that answers the question, for the tables below.\n\n")
    found = []
    for row in rows[: o.num_prompts]:
        tables = (Part(schemas[row["db"]][t] + "\n", passage=True) for t in row["table_order"])
        found.append(Request((task, *tables, _user(row["question"])), row["max_new_tokens"]))
    return found


def multi_turn(o: Options) -> Sequence[Request]:
    """W7: conversations over W1's catalogues; a turn quotes the answers to those before it."""
    systems, _ = _split("w1_shared_system_prompt", "prefix", "prefix_id", "system")
    found: list[Request] = []
    for row in _rows("w7_agent_multi_turn"):
        if o.num_prompts is not None and len(found) + len(row["turns"]) > o.num_prompts and found:
            break
        said: list[Part] = [_text(systems[row["prefix_id"]])]
        for turn in row["turns"]:
            said.append(_user(turn))
            found.append(Request(tuple(said), row["max_new_tokens_per_turn"]))
            said.append(Part(output_of=len(found) - 1))
    return found


def _segment(segment: dict[str, Any], article: str, wrote: dict[str, int]) -> Iterable[Part]:
    match segment["kind"]:
        case "role":
            return (Part(segment["text"] + "\n\n"),)
        case "shared":
            return (Part(article + "\n\n", passage=True),)
        case _:
            agent = segment["agent"]
            return (Part(f"The {agent} wrote: "), Part(output_of=wrote[agent]), Part("\n\n"))


def _user(text: str) -> Part:
    return Part(f"\n\nUser: {text}{_ANSWER}")


def _text(text: str) -> Part:
    return Part(text)


def _split(
    name: str, kind: str, key: str, value: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The shared texts of a file by their id, and its requests."""
    rows = list(_rows(name))
    shared = {row[key]: row[value] for row in rows if row["type"] == kind}
    return shared, [row for row in rows if row["type"] == "request"]


def _rows(name: str) -> Iterator[dict[str, Any]]:
    with (FOLDER / f"{name}.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
