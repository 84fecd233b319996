"""Sessions: what is kept is not evicted, and given back when the time is over."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.live_server import Client, serving, until

TURN = "a conversation that somebody wants to come back to, later on, after a pause"
GREEDY = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def small(tiny_path) -> Iterator[Client]:
    """40 pages: a few prompts fill them."""
    with serving(tiny_path, {"kv_cache_memory": 40 * 4096 * 2}) as client:
        yield client
        client.engine.check_integrity()


def ask(client: Client, prompt: str, **body: Any) -> int:
    """Prompt tokens that were cached."""
    status, answer = client.post("/v1/completions", {**GREEDY, "prompt": prompt, **body})
    assert status == 200, answer
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def fill(client: Client) -> None:
    total = client.get("/v1/kv/stats")[1]["pages"]["total"]
    for i in range(total // 8 + 2):
        ask(client, f"{i} " + "x" * 160)


def test_a_session_survives_what_evicts_everything_else(small):
    ask(small, TURN, session_id="mine")
    ask(small, "zebra " + TURN)
    fill(small)
    assert ask(small, "zebra " + TURN) == 0, "the cache was not full"
    fill(small)
    assert ask(small, TURN + " and on", session_id="mine") >= len(TURN)
    (session,) = small.get("/v1/sessions")[1]["sessions"]
    assert session["id"] == "mine"
    assert session["tokens"] >= len(TURN)
    assert small.get("/v1/kv/stats")[1]["pages"]["pinned"] == session["pages"]
    assert small.request("DELETE", "/v1/sessions/mine").status == 200
    assert small.request("DELETE", "/v1/sessions/mine").status == 404
    fill(small)
    assert ask(small, TURN) == 0


def test_a_session_ends_by_itself(small):
    ask(small, TURN, session_id="short", session_seconds=0.5)
    assert small.get("/v1/kv/stats")[1]["pages"]["pinned"] > 0
    until(lambda: not small.get("/v1/sessions")[1]["sessions"], 5)
    assert small.get("/v1/kv/stats")[1]["pages"]["pinned"] == 0
    small.post("/v1/kv/reset", {})
    pages = small.get("/v1/kv/stats")[1]["pages"]
    assert pages["free"] == pages["total"]


def test_sessions_never_keep_a_request_from_running(small):
    for i in range(12):
        ask(small, f"{i} {TURN}", session_id=f"s{i}")
    pages = small.get("/v1/kv/stats")[1]["pages"]
    assert 0 < pages["pinned"] <= pages["total"] // 2, "they hold half of the pages at most"
    assert ask(small, "y" * 250) == 0


def test_a_session_with_several_prompts_is_refused(small):
    body = {**GREEDY, "prompt": ["a", "b"], "session_id": "x"}
    status, answer = small.post("/v1/completions", body)
    assert (status, "one prompt" in answer["error"]["message"]) == (400, True)


def test_a_stream_that_is_left_keeps_what_there_is(small):
    body = {"prompt": TURN, "max_tokens": 150, "ignore_eos": True, "stream": True}
    answer = small.request("POST", "/v1/completions", {**body, "session_id": "left"})
    answer.read(10)
    answer.close()
    until(lambda: small.get("/v1/sessions")[1]["sessions"])
    assert ask(small, TURN) == len(TURN) - 1
