"""Servers for the tests: a real engine with a tiny random model, on loopback, in a thread."""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvjax.serving.config import ServeConfig
from kvjax.serving.server import Server
from kvjax.serving.service import Service

ENGINE = {
    "dtype": "float32", "max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 256,
    "kv_cache_memory": 2 << 20, "deterministic": True, "tensor_parallel_size": 1, "seed": 0,
}  # fmt: skip
WAIT = 60.0


@dataclasses.dataclass
class Client:
    """What the tests talk to a server with."""

    server: Server

    @property
    def service(self) -> Service:
        return self.server.service

    @property
    def engine(self) -> Any:
        return self.service.llm.engine

    @property
    def port(self) -> int:
        assert self.server.port is not None
        return self.server.port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> http.client.HTTPResponse:
        """An answer, not read yet. A body that is no bytes goes as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", "Connection": "close", **(headers or {})}
        connection.request(method, path, data, sent)
        return connection.getresponse()

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        """Status and JSON."""
        answer = self.request("GET", path, headers=headers)
        return answer.status, json.loads(answer.read())

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        """Status and JSON."""
        answer = self.request("POST", path, body, headers)
        return answer.status, json.loads(answer.read())

    def stream(self, path: str, body: Any) -> list[Any]:
        """The events of a stream; it must end as streams end."""
        answer = self.request("POST", path, {**body, "stream": True})
        assert answer.status == 200, answer.read()
        lines = [line for line in answer.read().decode().split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    def metric(self, name: str) -> float:
        """One sample of `/metrics` by its whole name."""
        text = self.request("GET", "/metrics").read().decode()
        (line,) = (line for line in text.splitlines() if line.startswith(f"kvjax:{name} "))
        return float(line.split()[-1])

    def drop_chunks(self) -> None:
        """Forgets every stored chunk, under whatever salt it was put."""
        llm = self.service.llm
        asyncio.run(llm.call(llm.engine.chunks.store.clear))

    def settled(self) -> None:
        """Waits until nothing runs; then every page is free or cached, and none is held."""
        until(lambda: not self.engine.has_work and self.service.admission.in_flight == 0)
        self.engine.check_integrity()
        pages = self.get("/v1/kv/stats")[1]["pages"]
        assert pages["held"] == 0
        assert pages["free"] + pages["cached_only"] + pages["pinned"] == pages["total"]


def until(condition: Callable[[], Any], seconds: float = WAIT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(model: Path, engine: dict[str, Any] | None = None, **config: Any) -> Iterator[Client]:
    """A server that is ready, and gone afterwards."""
    settings = {"served_model_name": "tiny", "port": 0, "max_refusals": 1e6, **config}
    server = Server(model, ServeConfig(**settings), {**ENGINE, **(engine or {})})
    thread = threading.Thread(target=server.run_until_stopped)
    thread.start()
    try:
        until(lambda: server.service.is_open or not thread.is_alive(), 120)
        yield Client(server)
    finally:
        server.should_exit = True
        thread.join()
