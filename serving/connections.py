"""What one connection may cost before there is a request: bytes of headers, and time.

uvicorn's parser has no limits of its own. A connection that sends nothing, or never ends its
headers, or never reads its answer, is closed.
"""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from kvjax.serving.config import ServeConfig
from kvjax.serving.errors import APIError
from kvjax.serving.refusals import Refusals

_DISCARDED = 8  # bodies of the largest size that are read and thrown away behind an answer


class _Refused(Exception):
    """Stops the parser; `Connection.refusal` says why."""


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with limits. `connection_class` sets `limits` and `refusals`."""

    limits: ServeConfig
    refusals: Refusals

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.refusal = APIError(400, "invalid HTTP request")
        self._headers_size = 0  # bytes of this request's headers so far
        self._unparsed = 0  # bytes of reads in which the parser got nowhere
        self._advanced = False  # in this read
        self._in_headers = self._in_body = False
        self._discarded = 0  # bytes of a body that came after the answer to it
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None  # the refusal is still to be sent

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Starts the clock for the first headers."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(503, f"max_connections={self.limits.max_connections} are open")
            self._end()
            return
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops all clocks."""
        self._stop(self._header_timer, self._write_timer, self._end_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feeds the parser; what leads nowhere is bounded."""
        if self._is_over:
            return
        self._advanced = False
        super().data_received(data)
        self._unparsed = 0 if self._advanced else self._unparsed + len(data)
        if self._unparsed > self.limits.max_header_bytes and not self._is_over:
            self._refuse_headers()
            self.send_400_response("")

    def send_400_response(self, msg: str) -> None:
        """Sends `refusal` when it is its turn, and closes."""
        self._stop(self._header_timer)
        if delay := self.refusals.delay():
            self.transport.pause_reading()
            self._end_timer = self.loop.call_later(delay, self._end)
        else:
            self._end()

    def _end(self) -> None:
        body = json.dumps(self.refusal.body).encode()
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(STATUS_LINE[self.refusal.status] + head % len(body) + body)
        self.transport.close()

    @property
    def _is_over(self) -> bool:
        return self._end_timer is not None or self.transport.is_closing()

    # ---- what the parser has found ----------------------------------------------------------

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self._advanced = self._in_headers = True
        self._headers_size = 0
        self._await_headers()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; trailers are dropped."""
        if not self._in_headers:
            return
        self._headers_size += len(name) + len(value) + 4
        if self._headers_size > self.limits.max_header_bytes:
            self._refuse_headers()
            raise _Refused
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """All headers: the request starts, if they are not too much."""
        self._advanced, self._in_headers = True, False
        self._stop(self._header_timer)
        if len(self.url) + self._headers_size > self.limits.max_header_bytes:
            self._refuse_headers()
            raise _Refused
        self._in_body, self._discarded = True, 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body; nobody wants it if the answer is out already."""
        self._advanced = True
        super().on_body(body)
        if self.cycle.response_complete:
            self._discarded += len(body)
            if self._discarded > _DISCARDED * self.limits.max_body_bytes:
                self.transport.close()

    def on_message_complete(self) -> None:
        """The end of the body."""
        self._advanced, self._in_body = True, False
        if self._discarded:
            self._stop(self._header_timer)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The answer is out: whoever still sends the body has some time to end it."""
        super().on_response_complete()
        if self._in_body:
            self._stop(self._header_timer)
            self._header_timer = self.loop.call_later(self.limits.body_timeout, self._too_slow)

    # ---- clocks -----------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """The client does not read: it has so long to go on."""
        super().pause_writing()
        self._stop(self._write_timer)
        self._write_timer = self.loop.call_later(self.limits.write_timeout, self._abandon)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        self._stop(self._write_timer)

    def _await_headers(self) -> None:
        self._stop(self._header_timer)
        self._header_timer = self.loop.call_later(self.limits.header_timeout, self._too_slow)

    def _too_slow(self) -> None:
        if self._is_over:
            return
        if self._in_headers:
            self._refuse(408, f"no headers within {self.limits.header_timeout:g} seconds")
            self.send_400_response("")
        else:
            self.transport.close()

    def _abandon(self) -> None:
        self.transport.abort()

    def _refuse_headers(self) -> None:
        limit = self.limits.max_header_bytes
        self._refuse(431, f"the request line and headers may have {limit} bytes")

    def _refuse(self, status: int, message: str) -> None:
        self.refusal = APIError(status, message)

    @staticmethod
    def _stop(*timers: asyncio.TimerHandle | None) -> None:
        for timer in timers:
            if timer is not None:
                timer.cancel()


def connection_class(limits: ServeConfig, refusals: Refusals) -> type[Connection]:
    """`Connection` with these limits, for `uvicorn.Config(http=...)`."""
    return type("LimitedConnection", (Connection,), {"limits": limits, "refusals": refusals})
