"""A small HTTP/1.1 client on asyncio, which hands over bytes the moment they arrive.

One connection per request, so that no pool of connections is measured. The standard library has
none that streams without a thread.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from kvjax.errors import KVJaxError

_LINE = 1 << 20  # bytes of the longest line


class Unreachable(KVJaxError, OSError):
    """Nobody answers at the address."""


class Refused(KVJaxError, ValueError):
    """The server answered with an error; `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status = status


async def request(
    method: str,
    url: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
    *,
    insecure: bool = False,
) -> AsyncGenerator[bytes, None]:
    """The bytes of an answer as they come. `body` is sent as JSON.

    Raises `Unreachable` or `Refused`, the latter with what the server said.
    """
    where = urlsplit(url)
    if where.scheme not in ("http", "https") or not where.hostname:
        raise ValueError(f"expected an http or https URL, got {url!r}")
    secure = where.scheme == "https"
    try:
        reader, writer = await asyncio.open_connection(
            where.hostname,
            where.port or (443 if secure else 80),
            ssl=_context(insecure) if secure else None,
            limit=_LINE,
        )
    except OSError as error:
        raise Unreachable(f"cannot reach {where.scheme}://{where.netloc}: {error}") from None
    try:
        data = b"" if body is None else json.dumps(body).encode()
        path = (where.path or "/") + (f"?{where.query}" if where.query else "")
        lines = [f"{method} {path} HTTP/1.1", f"Host: {where.netloc}", "Connection: close",
                 "Content-Type: application/json", f"Content-Length: {len(data)}",
                 *(f"{name}: {value}" for name, value in (headers or {}).items())]  # fmt: skip
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
        status, fields = await _head(reader)
        blocks = _body(reader, fields)
        if status != 200:
            raise Refused(status, _message(b"".join([block async for block in blocks])))
        async for block in blocks:
            yield block
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise Unreachable(f"{where.netloc} closed the connection: {error}") from None
    finally:
        writer.close()


async def get_json(url: str, headers: Mapping[str, str], *, insecure: bool = False) -> Any:
    """The answer to a GET, decoded. Raises `ValueError` for what is no JSON, and as `request`."""
    blocks = [b async for b in request("GET", url, headers=headers, insecure=insecure)]
    return json.loads(b"".join(blocks))


async def events(blocks: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    """The JSON of server-sent events, up to `[DONE]`."""
    rest = b""
    async for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            line = line.strip()
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                yield json.loads(data)


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines if line)
    return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}


async def _body(reader: asyncio.StreamReader, fields: Mapping[str, str]) -> AsyncIterator[bytes]:
    if fields.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
    elif "content-length" in fields:
        yield await reader.readexactly(int(fields["content-length"]))
    else:
        while block := await reader.read(1 << 16):
            yield block


def _message(data: bytes) -> str:
    """What an error's body says: OpenAI's message, or its beginning."""
    try:
        found = json.loads(data)
        return str(found["error"]["message"] if "error" in found else found["message"])
    except (ValueError, KeyError, TypeError):
        return data.decode(errors="replace")[:200]


def _context(insecure: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
