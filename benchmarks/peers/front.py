"""OpenAI's streaming `/v1/completions` in front of a worker's target; token ids in and out.

Only the standard library is imported: this runs in every peer's environment (see `worker.py`).
A target has `stream(prompt, max_tokens)`: a generator of lists of new ids, which runs one request
at a time, in a thread; or an asynchronous one, which may be called again while it runs. A number
among the lists says how many tokens of the prompt were cached.
"""

import asyncio
import inspect
import json
import threading


class Front:
    """Listens on a port of the loopback from a thread of its own."""

    def __init__(self, target) -> None:
        self.target = target
        self.lock = threading.Lock()  # a target that streams synchronously takes one at a time
        ready = threading.Event()
        self.port = 0
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, args=(ready,), daemon=True).start()
        ready.wait()

    def _run(self, ready) -> None:
        asyncio.set_event_loop(self.loop)
        server = self.loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self.loop.run_forever()

    async def _serve(self, reader, writer) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            size = int(head.lower().partition("content-length:")[2].split("\r\n")[0])
            request = json.loads(await reader.readexactly(size) or b"{}")
            if head.startswith("POST /v1/completions"):
                await self._complete(request, writer)
            elif head.startswith("GET /v1/models"):
                self._whole(writer, 200, {"data": [{"id": "target"}]})
            else:
                self._whole(writer, 404, {"error": {"message": "not here"}})
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _complete(self, request: dict, writer) -> None:
        prompt, count, cached = request["prompt"], 0, None
        stream = self._stream(prompt, request["max_tokens"])
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        try:
            async for ids in stream:
                if isinstance(ids, int):
                    cached = ids
                    continue
                count += len(ids)
                self._event(writer, {"choices": [{"index": 0, "text": "", "token_ids": ids}]})
                await writer.drain()
        except Exception as error:
            self._event(writer, {"error": {"message": f"{type(error).__name__}: {error}"}})
            return
        usage: dict = {"prompt_tokens": len(prompt), "completion_tokens": count}
        if cached is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        self._event(writer, {"choices": [], "usage": usage})
        writer.write(b"data: [DONE]\n\n")

    async def _stream(self, prompt: list[int], max_tokens: int):
        if inspect.isasyncgenfunction(self.target.stream):
            async for ids in self.target.stream(prompt, max_tokens):
                yield ids
            return
        queue: asyncio.Queue = asyncio.Queue()

        def send(item) -> None:
            self.loop.call_soon_threadsafe(queue.put_nowait, item)

        def work() -> None:
            try:
                with self.lock:
                    for ids in self.target.stream(prompt, max_tokens):
                        send(ids)
                send(None)
            except Exception as error:
                send(error)

        threading.Thread(target=work, daemon=True).start()
        while (item := await queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def _whole(self, writer, status: int, answer: dict) -> None:
        data = json.dumps(answer).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)

    def _event(self, writer, value: dict) -> None:
        writer.write(b"data: " + json.dumps(value).encode() + b"\n\n")
