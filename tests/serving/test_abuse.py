"""What clients may do to a server, and what it costs the others: clear answers, bounded memory."""

import concurrent.futures
import json
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kvjax.serving.config import ServeConfig
from kvjax.serving.connections import connection_class
from kvjax.serving.refusals import Refusals
from tests.serving.live_server import Client, serving, until

ASK = {"prompt": "ab", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
LONG = {"prompt": "ab", "max_tokens": 200, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def strict(tiny_path) -> Iterator[Client]:
    """Tight limits, so that tests need not wait."""
    with serving(
        tiny_path,
        max_queue=2,
        max_body_bytes=1 << 20,
        max_header_bytes=8192,
        max_connections=600,
        header_timeout=1.0,
        body_timeout=3.0,
        write_timeout=1.0,
    ) as client:
        yield client
        client.settled()


def raw(client: Client, data: bytes, *, more: Any = (), wait: float = 10) -> bytes:
    """Sends bytes as they are; what comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", client.port), timeout=wait) as connection:
        answer = b""
        try:
            connection.sendall(data)
            for piece in more:
                connection.sendall(piece)
            while received := connection.recv(65536):
                answer += received
        except (ConnectionResetError, BrokenPipeError):
            pass
        return answer


def status(answer: bytes) -> int:
    return int(answer.split()[1])


def test_a_body_over_the_limit_is_413_by_its_announced_length_or_as_it_comes(strict):
    huge = b'{"prompt": "' + b"x" * (2 << 20) + b'"}'
    got, answer = strict.post("/v1/completions", huge)
    assert got == 413
    assert str(1 << 20) in answer["error"]["message"]
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    chunked = raw(strict, head + b"Transfer-Encoding: chunked\r\n\r\n", more=[chunk] * 32)
    assert status(chunked) == 413


def test_a_body_without_end_is_cut_off(strict):
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n"
    start = time.monotonic()
    raw(strict, head, more=[b"x" * 65536] * 10_000)
    assert time.monotonic() - start < 20


def test_a_body_that_does_not_come_is_408(strict):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    assert status(raw(strict, head + b"Content-Length: 50\r\n\r\n{")) == 408


@pytest.mark.parametrize(
    ("data", "more"),
    [
        (b"GET /health HTTP/1.1\r\n" + b"X-A: " + b"a" * 20_000 + b"\r\n\r\n", []),
        (b"GET /health HTTP/1.1\r\n", [b"X-Flood-%d: abcdef\r\n" % i for i in range(5000)]),
        (b"GET /health HTTP/1.1\r\nX: ", [b"a" * 4096] * 500),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", []),
    ],
    ids=["long", "many", "endless", "path"],
)
def test_a_flood_of_headers_is_431_and_closed(strict, data, more):
    answer = raw(strict, data, more=more)
    assert answer == b"" or status(answer) == 431  # reset, when we are still sending


def test_a_flood_of_trailers_is_cut_off(strict):
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    data = head + b"Content-Type: application/json\r\n\r\n2\r\n{}\r\n0\r\nX: "
    start = time.monotonic()
    raw(strict, data, more=[b"a" * 4096] * 2000)
    assert time.monotonic() - start < 20


def test_what_is_no_http_is_400_in_openais_words(strict):
    answer = raw(strict, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n")
    assert status(answer) == 400
    assert b'"error"' in answer


def test_silent_and_slow_connections_are_closed_in_time(strict):
    start = time.monotonic()
    assert raw(strict, b"") == b""
    assert status(raw(strict, b"GET /health HTTP/1.1\r\nX-Slow: ")) == 408
    assert time.monotonic() - start < 15


def test_a_prompt_of_a_hundred_thousand_tokens_is_refused_and_others_go_on(strict):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        texts = [
            pool.submit(strict.post, "/v1/completions", {"prompt": "word " * 100_000})
            for _ in range(3)
        ]
        ids = pool.submit(strict.post, "/v1/completions", {"prompt": [65] * 100_000})
        seconds = []
        while not all(text.done() for text in texts):
            start = time.monotonic()
            assert strict.get("/health")[0] == 200
            seconds.append(time.monotonic() - start)
        for refused in (*texts, ids):
            got, answer = refused.result()
            assert got == 400
            assert answer["error"]["code"] == "context_length_exceeded"
    assert not seconds or statistics.median(seconds) < 0.5


def test_a_prompt_that_is_far_too_long_is_refused_by_its_beginning(strict, monkeypatch):
    tokenizer = strict.service.llm.get_tokenizer()
    encode, lengths = tokenizer.encode, []

    def noted(text: str, *rest: Any) -> list[int]:
        lengths.append(len(text))
        return encode(text, *rest)

    monkeypatch.setattr(type(tokenizer), "encode", lambda _, text, *rest: noted(text, *rest))
    for body, path in (
        ({"prompt": "x" * 500_000}, "/v1/completions"),
        ({"messages": [{"role": "user", "content": "x" * 500_000}]}, "/v1/chat/completions"),
    ):
        got, answer = strict.post(path, body)
        assert (got, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert "max_model_len=256" in answer["error"]["message"]
    assert max(lengths) < 5000
    got, answer = strict.post("/tokenize", {"prompt": "x" * 9000})
    assert (got, answer["count"]) == (200, 9000), "which is no prompt, and has no such limit"


def test_five_hundred_idle_connections_leave_room_for_others(strict):
    idle = [socket.create_connection(("127.0.0.1", strict.port)) for _ in range(500)]
    try:
        assert strict.post("/v1/completions", ASK)[0] == 200
        until(lambda: all(c.recv(1) == b"" for c in idle[:3]), 10)  # closed after header_timeout
    finally:
        for connection in idle:
            connection.close()


def test_connections_over_the_limit_are_told_503(tiny_path, strict):
    idle = [socket.create_connection(("127.0.0.1", strict.port)) for _ in range(600)]
    try:
        answer = raw(strict, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status(answer) == 503
    finally:
        for connection in idle:
            connection.close()
    until(lambda: strict.get("/health")[0] == 200, 10)


def test_beyond_the_queue_there_is_429_with_retry_after(strict):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        inside = [
            pool.submit(strict.post, "/v1/completions", {**LONG, "prompt": f"{i}"})
            for i in range(6)
        ]  # four run, two wait
        until(lambda: strict.service.admission.in_flight == 6)
        answer = strict.request("POST", "/v1/completions", ASK)
        assert answer.status == 429
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
        assert "max_queue=2" in json.loads(answer.read())["error"]["message"]
        assert [future.result()[0] for future in inside] == [200] * 6
    assert strict.post("/v1/completions", ASK)[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_gives_its_pages_back_within_a_step(strict, stream):
    strict.settled()
    body = json.dumps({**LONG, "n": 3, "stream": stream}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(body)
    steps_after: list[int] = []
    engine, llm = strict.engine, strict.service.llm
    step = engine.step

    def counted() -> Any:
        if left.is_set() and not steps_after and not engine.scheduler.running:
            return step()
        if left.is_set():
            steps_after.append(len(engine.scheduler.running))
        return step()

    left, aborted = threading.Event(), threading.Event()
    abort = llm._abort

    def noted(*args: Any) -> None:
        abort(*args)
        left.set()
        aborted.set()

    engine.step, llm._abort = counted, noted
    try:
        connection = socket.create_connection(("127.0.0.1", strict.port))
        connection.sendall(head + body)
        until(lambda: len(engine.scheduler.running) == 3)
        connection.close()
        assert aborted.wait(10)
        until(lambda: not engine.has_work)
    finally:
        del engine.step
        llm._abort = abort
    assert all(running == 0 for running in steps_after), steps_after
    assert len(steps_after) <= 1  # what was in flight is committed, nothing new is planned
    strict.settled()


def test_a_reader_that_stops_reading_is_dropped(tiny_path):
    """The answer to each of many pipelined requests; the client reads none of them."""
    ask = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    with serving(tiny_path, write_timeout=0.5) as client:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", client.port))
        connection.sendall(ask * 400)
        connections = client.server.server_state.connections
        until(lambda: len(connections) == 1)
        until(lambda: not connections, 20)
        connection.close()
        assert client.get("/health")[0] == 200


def test_a_request_that_takes_too_long_is_504_and_aborted(tiny_path):
    with serving(tiny_path, request_timeout=0.6) as client:
        step = client.engine.step

        def slow() -> Any:
            time.sleep(0.05)
            return step()

        client.engine.step = slow
        got, answer = client.post("/v1/completions", LONG)
        assert (got, answer["error"]["code"]) == (504, "timeout")
        answer = client.request("POST", "/v1/completions", {**LONG, "stream": True})
        assert answer.status == 200
        *_, error, done = [line for line in answer.read().decode().split("\n\n") if line]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "timeout"
        assert done == "data: [DONE]"
        client.settled()


def test_limits_that_make_no_sense_are_refused():
    cases: list[dict[str, Any]] = [
        {"port": 70000},
        {"max_queue": -1},
        {"step_timeout": 0},
        {"port": True},
    ]
    for wrong in cases:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ServeConfig(**wrong)
    assert connection_class(ServeConfig(port=1), Refusals(1)).limits.port == 1


def test_refusals_are_spaced_and_few_of_them_never_wait():
    now = [0.0]
    refusals = Refusals(10, lambda: now[0])
    assert [refusals.delay() for _ in range(10)] == [0.0] * 10
    assert [round(refusals.delay(), 6) for _ in range(3)] == [0.1, 0.2, 0.3]
    now[0] = 0.3
    assert round(refusals.delay(), 6) == 0.1
    last = [refusals.delay() for _ in range(100)][-1]
    assert round(last, 6) == 2.0, "nobody waits for ever"
    now[0] = 10.0
    assert [refusals.delay() for _ in range(10)] == [0.0] * 10
    with pytest.raises(ValueError, match="max_refusals"):
        ServeConfig(max_refusals=0)


def test_refused_requests_wait_their_turn_and_others_do_not(tiny_path):
    with serving(tiny_path, max_refusals=5) as client:
        start = time.monotonic()
        for _ in range(8):
            assert client.post("/v1/completions", {"prompt": ""})[0] == 400
        for _ in range(3):
            assert status(raw(client, b"\x16\x03\x01\r\n\r\n")) == 400
        assert time.monotonic() - start > 1.0
        start = time.monotonic()
        assert client.get("/health")[0] == 200
        assert time.monotonic() - start < 0.5
