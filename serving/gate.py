"""The way in: a request id, a key, and a body of bounded size that comes in bounded time."""

import asyncio
import contextlib
import json
import logging
import secrets
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvjax.serving.errors import APIError
from kvjax.serving.keys import ANYBODY, Tenant
from kvjax.serving.service import Service

log = logging.getLogger("kvjax.serving.access")

OPEN = frozenset({"/health", "/ready", "/version", "/openapi.json", "/ui"})  # no key needed
OPERATORS = ("/metrics", "/v1/kv/")  # what is common to all tenants
OWN = ("/v1/kv/chunks", "/v1/kv/requests")  # but for these, which show each tenant its own
_ID_LENGTH = 128
_CLOSE = {"Connection": "close"}
_DISCARDED = 8  # bodies of the largest size that are read and thrown away before a 413


class Gate:
    """ASGI middleware around everything. Leaves the tenant and the request id in the scope."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, headers = time.monotonic(), Headers(scope=scope)
        request_id = _request_id(headers)
        scope["kvjax.request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if 400 <= status < 500 and status != 429:  # which says itself when to come again
                    await asyncio.sleep(self._service.refusals.delay())
                own = (b"x-request-id", request_id.encode())
                message = {**message, "headers": [*message["headers"], own]}
            await send(message)

        limit = self._service.config.max_body_bytes
        body = _Body(receive, limit, self._service.config.body_timeout)
        try:
            scope["kvjax.tenant"] = self._tenant(scope["path"], headers)
            if int(headers.get("content-length") or 0) > limit:
                raise APIError(413, _too_large(limit), headers=_CLOSE)
            await self._app(scope, body, send_with_id)
        except APIError as error:
            await body.discard()
            await error.response()(scope, receive, send_with_id)
        finally:
            seconds = time.monotonic() - start
            self._record(scope, request_id, status, seconds)

    def _tenant(self, path: str, headers: Headers) -> Tenant:
        keys = self._service.keys
        if keys is None or path in OPEN:
            return ANYBODY
        scheme, _, key = headers.get("authorization", "").partition(" ")
        tenant = keys.tenant(key.strip()) if scheme.lower() == "bearer" else None
        if tenant is None:
            headers_ = {"WWW-Authenticate": "Bearer"}
            message = "an API key is needed: `Authorization: Bearer KEY`"
            raise APIError(401, message, code="invalid_api_key", headers=headers_)
        common = path.startswith(OPERATORS) and not path.startswith(OWN)
        if common and not tenant.operator:
            raise APIError(403, f"{path} is for operators' keys", code="not_an_operator")
        return tenant

    def _record(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = scope.get("route")
        path = getattr(route, "path", "other")  # a path as it came would be a label without limit
        self._service.metrics.responses.labels(path, str(status or 499)).inc()
        if log.isEnabledFor(logging.INFO):
            tenant: Tenant | None = scope.get("kvjax.tenant")
            log.info(
                "%s %s %d %.1f ms", scope["method"], path, status or 499, seconds * 1000,
                extra={"fields": {
                    "request_id": request_id, "method": scope["method"], "path": path,
                    "status": status or 499, "seconds": round(seconds, 6),
                    "tenant": tenant.name if tenant else None,
                }},
            )  # fmt: skip


class _Body:
    """`receive` of a request whose body is bounded in size and time."""

    def __init__(self, receive: Receive, limit: int, timeout: float) -> None:
        self._receive, self._limit = receive, limit
        self._deadline = time.monotonic() + timeout
        self._timeout, self._bytes, self._complete = timeout, 0, False

    async def __call__(self) -> Any:
        if self._complete:  # what is left to come is the client's leaving
            return await self._receive()
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            text = f"the body did not come within {self._timeout:g} seconds"
            raise HTTPException(408, text, _CLOSE) from None
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._bytes > self._limit:
                await self.discard()
                raise HTTPException(413, _too_large(self._limit), _CLOSE)
        return message

    async def discard(self) -> None:
        """Reads on for a while: many a client reads no answer before it has sent its body."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._deadline - time.monotonic()):
                while not self._complete and self._bytes <= _DISCARDED * self._limit:
                    message = await self._receive()
                    self._bytes += len(message.get("body", b""))
                    self._complete = not message.get("more_body", False)


def _too_large(limit: int) -> str:
    return f"the body may have {limit} bytes"


def _request_id(headers: Headers) -> str:
    """The client's own, if it is a plain word; else a new one."""
    given = headers.get("x-request-id", "")
    if 0 < len(given) <= _ID_LENGTH and given.isascii() and given.replace("-", "").isalnum():
        return given
    return secrets.token_hex(8)


class JSONFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)
