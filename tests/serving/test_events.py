"""`/v1/kv/events`: a router that follows the stream knows what is cached."""

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.live_server import Client, serving, until

SHARED = "a beginning that several prompts have in common, and "


class Index:
    """What a router keeps: the hashes of all blocks that are cached, by the events alone."""

    def __init__(self, client: Client) -> None:
        self.blocks: set[str] = set()
        self.seen: set[str] = set()
        self.orphans = 0
        self._connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
        self._connection.request("GET", "/v1/kv/events")
        self._answer = self._connection.getresponse()
        assert self._answer.headers["Content-Type"].startswith("text/event-stream")
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def _follow(self) -> None:
        for line in self._answer:
            if line.startswith(b"data: "):
                self.take(json.loads(line[6:]))

    def take(self, event: dict[str, Any]) -> None:
        self.seen.add(event["type"])
        if event["type"] == "stored":
            parent = event["parent_block_hash"]
            self.orphans += parent is not None and parent not in self.blocks
            self.blocks |= {*event["block_hashes"]}
        elif event["type"] == "removed":
            self.blocks -= {*event["block_hashes"]}
        else:
            self.blocks.clear()

    def leave(self) -> None:
        """Ends the stream from this side."""
        assert self._connection.sock is not None
        self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._connection.close()


def snapshot(client: Client) -> set[str]:
    answer = client.request("GET", "/v1/kv/events?snapshot_only=true").read().decode()
    events = [json.loads(text[6:]) for text in answer.split("\n\n") if text]
    assert all(event["type"] == "stored" for event in events)
    return {block for event in events for block in event["block_hashes"]}


@pytest.fixture
def small(tiny_path) -> Iterator[Client]:
    """40 pages: a few prompts fill them."""
    with serving(tiny_path, {"kv_cache_memory": 40 * 4096 * 2}) as client:
        yield client


def ask(client: Client, prompt: str, **body: Any) -> None:
    status, _ = client.post("/v1/completions", {"prompt": prompt, "max_tokens": 2, **body})
    assert status == 200


def test_an_index_that_follows_the_events_is_what_is_cached(small):
    ask(small, SHARED + "one")
    index = Index(small)  # it is told first what is there
    until(lambda: index.blocks == snapshot(small) != set())
    for number in range(12):
        ask(small, f"{SHARED if number % 2 else number}{number}" + "x" * 120)
    until(lambda: index.blocks == snapshot(small))
    assert index.seen == {"stored", "removed"}
    assert index.orphans == 0
    before = set(index.blocks)
    ask(small, SHARED + "one", cache_salt="another")
    until(lambda: index.blocks - before)
    assert snapshot(small) == index.blocks, "the same text under another salt has other hashes"
    small.post("/v1/kv/reset", {})
    until(lambda: not index.blocks)
    ask(small, SHARED + "one")
    llm = small.service.llm
    asyncio.run(llm.call(llm.engine._start_over))  # as after an error of the device
    until(lambda: not index.blocks and "cleared" in index.seen)
    assert snapshot(small) == set()
    observers = small.engine.scheduler.tree.observers
    followed = len(observers)
    index.leave()
    until(lambda: len(observers) < followed)


def test_requests_that_find_no_free_pages_wait_and_are_all_served(small):
    many = [f"{number} " + "y" * 150 for number in range(6)]  # ten pages each
    answers: list[int] = []
    waiting: list[int] = []

    def send(prompt: str) -> None:
        body = {"prompt": prompt, "max_tokens": 60, "ignore_eos": True}
        answers.append(small.post("/v1/completions", body)[0])

    threads = [threading.Thread(target=send, args=(prompt,)) for prompt in many]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        waiting.append(small.get("/v1/kv/stats")[1]["requests"]["waiting"])
    assert answers == [200] * len(many)
    assert max(waiting) >= 2, "the pages were enough for all"
    small.settled()
