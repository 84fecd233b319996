"""The serving benchmark's target behind a URL: any server that speaks OpenAI's completions."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from kvjax.benchmarks import http_stream
from kvjax.benchmarks.client import Record, Stopwatch
from kvjax.benchmarks.http_stream import Refused, Unreachable
from kvjax.benchmarks.workloads import Part, Request

_RETRY = 0.25  # seconds between two tries while the server starts


class OpenAITarget:
    """`endpoint` is `/v1/completions` (text or token ids) or `/v1/chat/completions` (text)."""

    def __init__(
        self,
        base_url: str,
        model: str | None,
        *,
        name: str = "openai",
        endpoint: str = "/v1/completions",
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        insecure: bool = False,
        adapters: Iterator[str] | None = None,
    ) -> None:
        """`model` None: the first that the server names. `body`: added to every request's.

        `adapters` name the model of each request in turn instead.
        """
        self.name, self.model = name, model
        self._base = base_url.rstrip("/").removesuffix("/v1")
        self._endpoint, self._chat = endpoint, "/chat/" in endpoint
        self._adapters = adapters
        self._body, self._headers, self._insecure = dict(body or {}), dict(headers or {}), insecure

    async def check(self, timeout_s: float = 0.0) -> None:
        """Waits until the server answers, then looks for the model.

        Raises `Unreachable` after `timeout_s`, and `ValueError` for a model it does not have.
        """
        end = time.monotonic() + timeout_s
        while True:
            try:
                known = await http_stream.get_json(
                    self._base + "/v1/models", self._headers, insecure=self._insecure
                )
                break
            except (Unreachable, Refused) as error:
                if isinstance(error, Refused) and error.status in (404, 405):
                    known = {"data": []}  # it does not tell; the first request will
                    break
                if time.monotonic() >= end or (isinstance(error, Refused) and error.status < 500):
                    raise
                await asyncio.sleep(_RETRY)
        names = [str(card["id"]) for card in known.get("data", [])]
        if self.model is None:
            if not names:
                raise ValueError(f"{self._base} does not tell its models: name one with --model")
            self.model = names[0]
        if names and self.model not in names:
            raise ValueError(
                f"{self._base} has no model {self.model!r}; it has {', '.join(map(repr, names))}"
            )

    async def send(self, parts: Sequence[Part], request: Request, record: Record) -> None:
        body = {
            "model": next(self._adapters) if self._adapters else self.model,
            "max_tokens": request.max_tokens, "temperature": 0.0, "stream": True,
            "stream_options": {"include_usage": True}, **self._prompt(parts),
            **self._body,
        }  # fmt: skip
        if request.n > 1:
            body["n"] = request.n
        record.input_len = sum(len(part.token_ids) for part in parts)
        watch = Stopwatch(record)
        blocks = http_stream.request(
            "POST", self._base + self._endpoint, body, self._headers, insecure=self._insecure
        )
        pieces: list[str] = []
        outputs = 0
        usage: dict[str, Any] | None = None
        async with contextlib.aclosing(blocks):
            async for event in http_stream.events(blocks):
                if "error" in event:
                    raise ValueError(str(event["error"].get("message", event["error"])))
                for choice in event.get("choices") or ():
                    piece = _piece(choice)
                    if piece or choice.get("token_ids"):
                        watch.output()
                        outputs += 1
                    if ids := choice.get("token_ids"):
                        record.token_ids += tuple(ids)
                    if piece and not choice.get("index"):
                        pieces.append(piece)
                usage = event.get("usage") or usage
        record.text, record.output_len = "".join(pieces), outputs
        if usage is not None:
            record.input_len = int(usage.get("prompt_tokens") or record.input_len)
            record.output_len = int(usage.get("completion_tokens") or outputs)
            record.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")

    async def reset(self) -> None:
        """Asks kvjax's and vLLM's way of emptying the cache; other servers keep theirs."""
        for path in ("/v1/kv/reset", "/reset_prefix_cache"):
            with contextlib.suppress(Refused):
                await self._post(path)
                return

    @contextlib.asynccontextmanager
    async def profile(self) -> AsyncIterator[None]:
        """The server's profiler runs meanwhile, by vLLM's routes; it knows where its trace goes.

        Raises `Refused` for a server that has none.
        """
        await self._post("/start_profile")
        try:
            yield
        finally:
            await self._post("/stop_profile")

    async def _post(self, path: str) -> None:
        answer = http_stream.request("POST", self._base + path, None, self._headers)
        async with contextlib.aclosing(answer):
            async for _ in answer:
                pass

    async def close(self) -> None:
        """The server is not ours."""

    def _prompt(self, parts: Sequence[Part]) -> dict[str, Any]:
        texts = [part.text for part in parts]
        if all(texts):
            text = "".join(texts)
            if self._chat:
                return {"messages": [{"role": "user", "content": text}]}
            return {"prompt": text}
        if self._chat or any(texts):
            raise ValueError(
                "this workload is token ids, which only /v1/completions takes: choose another "
                "workload or endpoint"
            )
        return {"prompt": [token for part in parts for token in part.token_ids]}


def _piece(choice: Mapping[str, Any]) -> str:
    delta = choice.get("delta") or {}
    return choice.get("text") or delta.get("content") or delta.get("reasoning_content") or ""
