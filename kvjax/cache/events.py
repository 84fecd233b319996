"""What enters and leaves the prefix cache, as block hashes for a router that keeps an index of it.

A block is a whole page of tokens behind a given beginning. Its hash is, in hex, 16 bytes of

    sha256(hash of the block before + tokens as little-endian uint32)

and before the first block stands `root_hash(namespace)`, which the tenant's salt is part of.
"""

import hashlib
import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from kvjax.cache.radix import RadixNode, RadixTree

Event = dict[str, Any]


class BlockEvents:
    """A `TreeObserver` that words what it is told and hands it to `publish`."""

    def __init__(self, page_size: int, publish: Callable[[Event], None]) -> None:
        self._page_size, self._publish = page_size, publish

    def matched(self, page_ids: Sequence[int]) -> None:
        """Nothing changes."""

    def stored(
        self, namespace: Hashable, tokens: np.ndarray, known: int, page_ids: Sequence[int]
    ) -> None:
        """Publishes the blocks that are complete now and were not before."""
        event = self._stored(namespace, tokens, known)
        if event is not None:
            self._publish(event)

    def removed(self, node: RadixNode, kept: int, page_ids: Sequence[int]) -> None:
        """Publishes the blocks that are complete no more."""
        hashes = block_hashes(node.namespace, path_tokens(node), self._page_size)
        gone = hashes[kept // self._page_size :]
        if gone:
            self._publish({"type": "removed", "block_hashes": gone})

    def cleared(self) -> None:
        """Publishes that nothing is left."""
        self._publish({"type": "cleared"})

    def snapshot(self, tree: RadixTree) -> Iterator[Event]:
        """What is cached now, as if it had been stored one node after the other, parents first."""
        for node in tree.nodes():
            event = self._stored(node.namespace, path_tokens(node), node.start)
            if event is not None:
                yield event

    def _stored(self, namespace: Hashable, tokens: np.ndarray, known: int) -> Event | None:
        hashes = block_hashes(namespace, tokens, self._page_size)
        first = known // self._page_size
        if first >= len(hashes):
            return None
        return {
            "type": "stored",
            "block_hashes": hashes[first:],
            "parent_block_hash": hashes[first - 1] if first else None,
            "block_size": self._page_size,
        }


def root_hash(namespace: Hashable) -> bytes:
    """What the first block of a namespace is hashed behind."""
    return hashlib.sha256(json.dumps(namespace, default=str).encode()).digest()[:16]


def block_hashes(namespace: Hashable, tokens: np.ndarray, page_size: int) -> list[str]:
    """The hashes of all whole blocks of `tokens`."""
    data = np.ascontiguousarray(tokens, dtype="<u4").tobytes()
    parent, size, hashes = root_hash(namespace), 4 * page_size, []
    for at in range(0, len(data) - size + 1, size):
        parent = hashlib.sha256(parent + data[at : at + size]).digest()[:16]
        hashes.append(parent.hex())
    return hashes


def path_tokens(node: RadixNode) -> np.ndarray:
    """The tokens from the root to the end of `node`."""
    spans, above = [], node
    while above is not None:
        spans.append(above.tokens)
        above = above.parent
    return np.concatenate(spans[::-1])
