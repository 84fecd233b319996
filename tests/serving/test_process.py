"""`kvjax serve` as a process: the ready line, the settings' layers, signals."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvjax.serving.config import ServeConfig
from tests.serving.live_server import until

FLAGS = ["--dtype=float32", "--max-num-seqs=2", "--max-num-batched-tokens=32"]
FLAGS += ["--kv-cache-memory=2M"]


class Process:
    """A server in a process of its own."""

    def __init__(self, folder: Path, words: list[str], **environment: str) -> None:
        self.output = folder / f"out-{time.monotonic_ns()}"
        self._file = self.output.open("w")
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "kvjax.cli", "serve", *words],
            stdout=self._file, stderr=self._file, env=os.environ | environment,
        )  # fmt: skip

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def url(self) -> str:
        def ready() -> Any:
            assert self.popen.poll() is None, self.text
            return re.search(r"ready: .* at (http://\S+)", self.text)

        until(ready, 120)
        return ready()[1]

    def ask(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"}
        try:
            request = urllib.request.Request(self.url + path, body, headers)
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    started: list[Process] = []

    def begin(*words: str, **environment: str) -> Process:
        started.append(Process(tmp_path, list(words), **environment))
        return started[-1]

    yield begin
    for process in started:
        process.popen.kill()
        process.popen.wait()


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(start, tiny_path):
    process = start(str(tiny_path), "--port=0", *FLAGS)
    body = b'{"prompt": "ab", "max_tokens": %d, "ignore_eos": true, "temperature": 0}'
    assert process.ask("/v1/completions", body % 4)[0] == 200
    with concurrent.futures.ThreadPoolExecutor() as pool:
        long = [pool.submit(process.ask, "/v1/completions", body % 500) for _ in range(2)]
        until(lambda: b'"running":2' in process.ask("/v1/kv/stats")[1])
        process.popen.send_signal(signal.SIGTERM)
        until(lambda: process.ask("/ready")[0] == 503)
        status, answer = process.ask("/v1/completions", body % 4)
        assert (status, b"draining" in answer) == (503, True)
        for request in long:
            status, answer = request.result()
            assert status == 200
            assert b'"completion_tokens":500' in answer
    assert process.popen.wait(30) == 0, process.text
    assert "SIGTERM: 2 completions finish" in process.text


def test_a_second_sigterm_stops_at_once(start, tiny_path):
    process = start(str(tiny_path), "--port=0", *FLAGS)
    body = b'{"prompt": "ab", "max_tokens": 500, "n": 16, "ignore_eos": true}'
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pool.submit(lambda: process.ask("/v1/completions", body))
        until(lambda: b'"running":2' in process.ask("/v1/kv/stats")[1])
        process.popen.send_signal(signal.SIGTERM)
        until(lambda: "SIGTERM" in process.text)
        begun = time.monotonic()
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(10) == 128 + signal.SIGTERM
        assert time.monotonic() - begun < 2


@pytest.mark.slow
def test_a_server_killed_in_a_stream_or_while_it_starts_leaves_nothing_broken(
    start, tiny_path, tmp_path
):
    cache = {"KVJAX_CACHE_DIR": str(tmp_path / "cache")}
    words = [str(tiny_path), "--port=0", *FLAGS]
    body = {"prompt": "ab", "max_tokens": 500, "ignore_eos": True, "temperature": 0}
    loading = start(*words, **cache)
    until(lambda: any((tmp_path / "cache").rglob("*")))  # programs are being written
    loading.popen.kill()
    first = start(*words, **cache)
    whole = json.loads(first.ask("/v1/completions", json.dumps(body).encode())[1])
    connection = http.client.HTTPConnection(first.url.removeprefix("http://"), timeout=60)
    stream = json.dumps({**body, "stream": True}).encode()
    connection.request("POST", "/v1/completions", stream, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.readline().startswith(b"data: ")
    first.popen.kill()
    with contextlib.suppress(http.client.IncompleteRead, ConnectionError):
        assert b"[DONE]" not in answer.read()
    second = start(*words, **cache)
    again = json.loads(second.ask("/v1/completions", json.dumps(body).encode())[1])
    assert again["choices"] == whole["choices"]
    assert again["usage"]["completion_tokens"] == 500


def test_a_flag_wins_over_the_environment_and_that_over_the_file(start, tiny_path, tmp_path):
    file = tmp_path / "server.yaml"
    settings = {
        "model": tiny_path, "port": 0, "max-queue": 5, "dtype": "float32", "max_num_seqs": 2,
        "max_num_batched_tokens": 32, "kv_cache_memory": "2M", "overlap": False,
        "served_model_name": "from-file", "log_format": "text",
    }  # fmt: skip
    file.write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    process = start(
        "--config", str(file), "--log-format=json",
        KVJAX_SERVED_MODEL_NAME="from-environment", KVJAX_LOG_FORMAT="text",
    )  # fmt: skip
    assert b'"id":"from-environment"' in process.ask("/v1/models")[1]
    until(lambda: '"path": "/v1/models"' in process.text)


@pytest.mark.parametrize(
    ("words", "environment", "says"),
    [
        ([], {}, "which MODEL"),
        (["m", "--port=0", "--config=no-such.yaml"], {}, "no-such.yaml"),
        (["m"], {"KVJAX_PORT": "many"}, "KVJAX_port"),
        (["m", "--max-queue=-1"], {}, "max_queue"),
        (["no-such-model", "--port=0"], {}, "no model 'no-such-model'"),
        (["m", "--host=203.0.113.1"], {}, "203.0.113.1:8000"),
    ],
)
def test_what_cannot_be_served_is_told_with_status_2(words, environment, says, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "KVJAX_MODEL"} | environment
    done = subprocess.run(
        [sys.executable, "-m", "kvjax.cli", "serve", *words],
        capture_output=True, text=True, env=environment, timeout=150, check=False,
    )  # fmt: skip
    assert (done.returncode, says in done.stderr) == (2, True), done.stderr


def test_there_is_a_flag_for_every_field_with_its_default():
    from kvjax.cli import layers, parser

    args = layers.layered(parser().parse_args(["serve", "m"]))
    config = ServeConfig()
    assert {name: getattr(args, name) for name in config.__dataclass_fields__} == vars(config)
