"""A server with known delays that speaks OpenAI's streaming completions, for the client's tests.

It notes when it really sent what: a busy machine lets it oversleep, and that is no error of whoever
measures it.
"""

import asyncio
import contextlib
import json
import time


class KnownDelays:
    """Use with `async with`: `url` is where it listens. Counts what it is asked."""

    def __init__(self, first=0.05, gap=0.02, model="known", fail_on=None, die_after=None):
        self.first, self.gap, self.model = first, gap, model
        self.fail_on, self.die_after = fail_on, die_after  # numbers of requests
        self.bodies, self.running, self.most, self.resets = [], 0, 0, 0
        self.profiles = []
        self.outputs = []  # per request, seconds from its coming to each output

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *exception):
        self._server.close()

    async def _serve(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            size = int(head.lower().partition("content-length:")[2].split("\r\n")[0])
            body = await reader.readexactly(size)
            await self._answer(head.split()[:2], json.loads(body) if body else None, writer)
        writer.close()

    async def _answer(self, line, body, writer):
        if line == ["GET", "/v1/models"]:
            return self._whole(writer, 200, {"data": [{"id": self.model}]})
        if line[1] in ("/start_profile", "/stop_profile"):
            self.profiles.append(line[1])
            return self._whole(writer, 200, {})
        if line[1] == "/v1/kv/reset":
            self.resets += 1
            return self._whole(writer, 200, {})
        came = time.perf_counter()
        self.bodies.append(body)
        self.outputs.append([])
        number = len(self.bodies) - 1
        if number == self.fail_on:
            return self._whole(writer, 400, {"error": {"message": "no room"}})
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        self.running += 1
        self.most = max(self.most, self.running)
        for step in range(body["max_tokens"]):
            due = came + self.first + step * self.gap
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if number == self.die_after and step == 1:
                self.running -= 1
                return None
            self.outputs[number].append(time.perf_counter() - came)
            self._event(writer, {"choices": [{"index": 0, "text": " x"}]})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"],
                 "prompt_tokens_details": {"cached_tokens": 2}}  # fmt: skip
        self._event(writer, {"choices": [], "usage": usage})
        self._chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        self.running -= 1
        return await writer.drain()

    def _whole(self, writer, status, answer):
        data = json.dumps(answer).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)

    def _event(self, writer, value):
        self._chunk(writer, b"data: " + json.dumps(value).encode() + b"\n\n")

    def _chunk(self, writer, data):
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
