"""A process full of bad clients: `python -m tests.serving.abusers PORT PAUSE`, until it is killed.

PAUSE is in seconds, between two attacks of one kind.
"""

import contextlib
import itertools
import json
import socket
import sys
import threading
import time
from collections.abc import Callable


def completion(body: bytes, length: int | None = None) -> bytes:
    """A request as it goes over the wire."""
    size = len(body) if length is None else length
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {size}"
    )
    head += "\r\nContent-Type: application/json\r\n\r\n"
    return head.encode() + body


def prompt(value: object) -> bytes:
    return completion(json.dumps({"prompt": value, "max_tokens": 1}).encode())


ATTACKS: dict[str, bytes] = {
    "oversize body": completion(b'{"prompt": "' + b"x" * (2 << 20) + b'"}'),
    "deep JSON": completion(b"[" * 200_000),
    "100k tokens of text": prompt("word " * 20_000),
    "100k token ids": prompt([65] * 100_000),
    "invalid UTF-8": completion(b'{"prompt": "\xff\xfe"}'),
    "body that does not come": completion(b"{", 50),
    "header flood": b"GET /health HTTP/1.1\r\n" + b"X-Flood: abcdef\r\n" * 20_000,
    "long path": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n",
}


def attack(port: int, data: bytes) -> None:
    """Sends it and reads what comes back."""
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", port), timeout=5) as connection,
    ):
        connection.sendall(data)
        while connection.recv(65536):
            pass


def read_slowly(port: int) -> None:
    """Asks for much and reads a byte now and then."""
    with contextlib.suppress(OSError), socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
        for _ in range(20):
            connection.recv(1)
            time.sleep(0.1)


def repeat(act: Callable[[], None], pause: float) -> None:
    while True:
        act()
        time.sleep(pause)


def idle(port: int, count: int) -> None:
    """Keeps so many connections that say nothing."""
    kept: list[socket.socket] = []
    for number in itertools.count():
        with contextlib.suppress(OSError):
            kept.append(socket.create_connection(("127.0.0.1", port), timeout=5))
        if len(kept) > count:
            kept.pop(0).close()
        time.sleep(0.0 if number < count else 0.05)


def main(port: int, pause: float) -> None:
    acts = [lambda data=data: attack(port, data) for data in ATTACKS.values()]
    for act in (*acts, lambda: read_slowly(port)):
        threading.Thread(target=repeat, args=(act, pause), daemon=True).start()
    idle(port, 500)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
