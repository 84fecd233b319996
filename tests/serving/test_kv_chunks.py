"""Chunks over HTTP: put, listed, pinned, deleted, named in prompts, and never another tenant's."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from kvjax import Chunk, SamplingParams
from kvjax.cache.chunks import tokens_hash
from kvjax.marked import StandIns
from kvjax.request import RequestOutput
from kvjax.serving import replies
from kvjax.serving.keys import ANYBODY, Tenant
from kvjax.serving.put_chunks import PutChunks
from kvjax.serving.schemas import ChunkPart
from tests.serving.live_server import Client

A, B = "The fox is red and lives in a den. ", "The hen is white and lays one egg a day. "
ASK = "What colour is the hen?"
EPIC = "epic:k=2"
BODY: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "reuse": EPIC}


@pytest.fixture
def chunked(served: Client) -> Iterator[Client]:
    """The shared server; it lets every strategy through, and goes on without these chunks."""
    served.drop_chunks()
    yield served
    served.drop_chunks()


def put(client: Client, text: str, **more: Any) -> dict[str, Any]:
    status, answer = client.post("/v1/kv/chunks", {"text": text, **more})
    assert status == 200, answer
    replies.ChunkInfo.model_validate(answer)
    return answer


def complete(client: Client, **body: Any) -> dict[str, Any]:
    status, answer = client.post("/v1/completions", {**BODY, **body})
    assert status == 200, answer
    replies.CompletionReply.model_validate(answer)
    return answer


async def library(client: Client, prompt: Any, params: SamplingParams) -> RequestOutput:
    outputs = [output async for output in client.service.llm.generate(prompt, params)]
    return outputs[-1]


def report(client: Client, answer: dict[str, Any]) -> dict[str, Any]:
    status, told = client.get(f"/v1/kv/requests/{answer['id']}/reuse")
    assert status == 200, told
    replies.RequestReuse.model_validate(told)
    (prompt,) = told["prompts"]
    return prompt


def test_a_chunk_is_put_listed_pinned_unpinned_and_deleted(chunked):
    chunk = put(chunked, A)
    assert chunk["id"] == tokens_hash(chunked.service.llm.get_tokenizer().encode(A))
    assert (chunk["stored"], chunk["pinned"], len(chunk["variants"])) == (True, False, 1)
    assert put(chunked, A)["id"] == chunk["id"], "the same tokens are the same chunk"
    path = f"/v1/kv/chunks/{chunk['id']}"
    status, listed = chunked.get("/v1/kv/chunks")
    replies.ChunkList.model_validate(listed)
    assert (status, [one["id"] for one in listed["data"]]) == (200, [chunk["id"]])
    for _ in range(2):
        assert chunked.post(f"{path}/pin", {})[1]["pinned"] is True
    assert chunked.get("/v1/kv/stats")[1]["chunks"]["pinned"] == 1
    assert chunked.post(f"{path}/unpin", {})[1]["pinned"] is False
    assert put(chunked, A, pin=True)["pinned"] is True
    assert chunked.request("DELETE", path).status == 200
    assert chunked.get(path)[0] == 404
    assert chunked.post(f"{path}/pin", {})[0] == 404
    assert chunked.request("DELETE", path).status == 404
    assert chunked.get("/v1/kv/stats")[1]["chunks"]["pages"] == 0


def test_a_list_of_chunks_comes_in_pages(chunked):
    ids = sorted(put(chunked, f"chunk {number}")["id"] for number in range(5))
    first = chunked.get("/v1/kv/chunks?limit=3")[1]
    rest = chunked.get(f"/v1/kv/chunks?limit=3&after={first['data'][-1]['id']}")[1]
    assert (first["has_more"], rest["has_more"]) == (True, False)
    assert [one["id"] for one in first["data"] + rest["data"]] == ids
    for one in ids:
        chunked.request("DELETE", f"/v1/kv/chunks/{one}").read()


def test_a_prompt_with_chunks_is_that_of_the_library_and_says_what_was_reused(chunked):
    ids = put(chunked, A)["id"], put(chunked, B)["id"]
    params = {k: v for k, v in BODY.items() if k != "reuse"}
    asked = SamplingParams(**params, reuse=EPIC, cache_salt="library")
    expected = asyncio.run(library(chunked, ["", Chunk(A), Chunk(B), ASK], asked))
    by_text = complete(chunked, prompt=ASK, chunks=[A, B])
    by_id = complete(chunked, prompt=ASK, chunks=[{"id": one} for one in ids])
    parts = [{"type": "chunk", "id": ids[0]}, {"chunk": B}, ASK]
    inside = complete(chunked, prompt=parts)
    for answer in (by_text, by_id, inside):
        assert answer["choices"][0]["text"] == expected.outputs[0].text
    details = by_text["usage"]["prompt_tokens_details"]
    assert by_text["usage"]["prompt_tokens"] == len(A + B + ASK)
    assert details["cached_tokens"] == len(A + B) - 2
    assert (details["shifted_tokens"], details["recomputed_tokens"]) == (len(B) - 2, 2)
    told = report(chunked, by_text)
    assert (told["strategy"], told["prompt_tokens"]) == (EPIC, len(A + B + ASK))
    assert [(s["fate"], s["text"]) for s in told["segments"]] == [
        ("exact", A), ("recomputed", B[:2]), ("shifted", B[2:]), ("computed", ASK),
    ]  # fmt: skip


def test_without_a_strategy_chunks_are_ordinary_text(chunked):
    prompt = complete(chunked, prompt=A + B + ASK, reuse=None)
    marked = complete(chunked, prompt=ASK, chunks=[A, B], reuse="prefix", cache_salt="x")
    assert marked["choices"] == prompt["choices"]
    assert marked["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_chunk_in_a_message_and_chunks_in_front_of_the_first_one_are_the_same_prompt(chunked):
    said = [
        {"chunk": A},
        {"type": "chunk", "text": B},
        {"type": "text", "text": ASK},
    ]
    body = {**BODY, "return_token_ids": True}
    inside = {"messages": [{"role": "user", "content": said}]}
    in_front = {"messages": [{"role": "user", "content": ASK}], "chunks": [A, {"text": B}]}
    plain = {"messages": [{"role": "user", "content": A + B + ASK}]}
    answers = []
    for prompt in (inside, in_front, plain):
        status, answer = chunked.post("/v1/chat/completions", {**body, **prompt})
        assert status == 200, answer
        replies.ChatReply.model_validate(answer)
        answers.append(answer)
    tokens = [answer["choices"][0]["prompt_token_ids"] for answer in answers]
    assert tokens[0] == tokens[1] == tokens[2]
    assert chunked.post("/tokenize", inside)[1]["tokens"] == tokens[0]
    assert answers[0]["choices"] == answers[1]["choices"]
    details = [answer["usage"]["prompt_tokens_details"] for answer in answers]
    assert details[0]["shifted_tokens"] == len(A + B) - 4
    assert "shifted_tokens" not in details[2]


def test_a_stream_has_the_same_text_and_usage(chunked):
    body = {**BODY, "prompt": ASK, "chunks": [B, A]}
    whole = complete(chunked, prompt=ASK, chunks=[B, A])
    events = chunked.stream("/v1/completions", {**body, "stream_options": {"include_usage": True}})
    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == whole["choices"][0]["text"]
    details = events[-1]["usage"]["prompt_tokens_details"]
    assert details.keys() == whole["usage"]["prompt_tokens_details"].keys()
    assert report(chunked, events[0])["strategy"] == EPIC


def test_the_openai_client_takes_chunks_and_reads_the_counts(chunked):
    client = openai.OpenAI(base_url=f"{chunked.url}/v1", api_key="none")
    answer = client.completions.create(
        model="tiny", prompt=ASK, max_tokens=2, extra_body={"reuse": EPIC, "chunks": [B]}
    )
    assert answer.usage is not None
    details: Any = answer.usage.prompt_tokens_details
    assert details.cached_tokens >= len(B) - 2
    assert details.recomputed_tokens is not None


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"reuse": "epic:k=x"}, 400, "k"),
        ({"reuse": "magic"}, 400, "magic"),
        ({"reuse": "epic:q=2"}, 400, "'q'"),
        ({"chunks": [{"id": "0" * 32}]}, 404, "0" * 32),
        ({"chunks": [{"id": "zz"}]}, 400, "id"),
        ({"chunks": [{"text": "a", "id": "0" * 32}]}, 400, "exactly one"),
        ({"chunks": [""]}, 400, "chunks"),
        ({"chunks": [{"token_ids": [9999]}]}, 400, "9999"),
        ({"chunks": ["x" * 300]}, 400, "max_model_len"),
    ],
)
def test_what_is_no_chunk_or_no_strategy_is_told_before_any_work(chunked, body, status, says):
    computed = chunked.engine.runner.real_tokens
    got, answer = chunked.post("/v1/completions", {**BODY, "prompt": "x", **body})
    assert got == status, answer
    replies.ErrorReply.model_validate(answer)
    assert says in answer["error"]["message"]
    assert chunked.engine.runner.real_tokens == computed


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({}, 400, "exactly one"),
        ({"text": "x" * 300}, 400, "max_model_len"),
        ({"token_ids": [1, 9999]}, 400, "9999"),
        ({"text": "x", "reuse": "magic"}, 400, "magic"),
    ],
)
def test_what_cannot_be_put_is_told(chunked, body, status, says):
    got, answer = chunked.post("/v1/kv/chunks", body)
    assert got == status, answer
    assert says in answer["error"]["message"]


def test_pins_leave_room_for_others(chunked):
    capacity = chunked.get("/v1/kv/stats")[1]["chunks"]["capacity_pages"]
    size, pages = chunked.engine.spec.page_size, 15
    fit = capacity // 2 // pages
    bodies = [{"text": f"{i}".rjust(size * pages, "."), "pin": True} for i in range(fit + 1)]
    statuses = [chunked.post("/v1/kv/chunks", body)[0] for body in bodies]
    assert statuses == [200] * fit + [409]
    assert chunked.get("/v1/kv/stats")[1]["chunks"]["pinned"] == fit
    chunk = put(chunked, bodies[0]["text"], pin=True)
    assert chunked.post(f"/v1/kv/chunks/{chunk['id']}/unpin", {})[0] == 200
    assert put(chunked, bodies[-1]["text"], pin=True)["pinned"] is True


def test_an_evicted_chunk_is_computed_again_when_it_is_named(chunked):
    chunk = put(chunked, B + "once more")
    chunked.drop_chunks()
    assert chunked.get(f"/v1/kv/chunks/{chunk['id']}")[1]["stored"] is False
    answer = complete(chunked, prompt=ASK, chunks=["lead", {"id": chunk["id"]}])
    assert answer["usage"]["prompt_tokens_details"]["shifted_tokens"] == chunk["tokens"] - 2


def test_what_a_tenant_put_is_bounded_and_the_oldest_forgotten():
    shelf = PutChunks(max_chunks=3, max_tokens=10)
    ids = [shelf.put(ANYBODY, None, [number]) for number in range(3)]
    assert shelf.get(ANYBODY, None, ids[0]) == [0]
    ids.append(shelf.put(ANYBODY, None, [3]))
    assert [shelf.get(ANYBODY, None, one) is not None for one in ids] == [True, False, True, True]
    assert shelf.get(ANYBODY, "salt", ids[0]) is None
    assert shelf.get(Tenant("other", None, operator=True), None, ids[0]) is None
    shelf.put(ANYBODY, None, list(range(9)))
    assert sum(shelf.ids(ANYBODY, None).values()) <= 10


def test_a_template_that_changes_drops_or_repeats_a_chunk_cannot_place_it():
    chunks: StandIns[ChunkPart] = StandIns()
    stand_in = chunks.put(ChunkPart(text="a"))
    assert chunks.cut(f"x{stand_in}y") == ["x", ChunkPart(text="a"), "y"]
    for text, numbers in ((stand_in[1:], r"\[\]"), ("", r"\[\]"), (2 * stand_in, r"\[0, 0\]")):
        with pytest.raises(ValueError, match=f"each of 1 chunks once, got {numbers}"):
            chunks.cut(text)
