"""Who is told what enters and leaves the prefix cache."""

from collections.abc import Hashable
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from kvjax.cache.radix import RadixNode


class TreeObserver(Protocol):
    """`RadixTree.observer`. Called inside the change: it must neither raise nor touch the tree."""

    def stored(self, namespace: Hashable, tokens: np.ndarray, known: int) -> None:
        """`tokens` are cached now, of which the first `known` were before."""
        ...

    def removed(self, node: "RadixNode", kept: int) -> None:
        """`node`, still in its place, is about to lose its tokens from index `kept` on."""
        ...

    def cleared(self) -> None:
        """Everything is gone."""
        ...
