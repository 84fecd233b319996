"""Who is told what enters and leaves the prefix cache."""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from kvjax.cache.radix import RadixNode


class TreeObserver(Protocol):
    """One of `RadixTree.observers`. Called inside the change: it must neither raise nor touch the
    tree."""

    def matched(self, page_ids: Sequence[int]) -> None:
        """A request found these pages."""
        ...

    def stored(
        self, namespace: Hashable, tokens: np.ndarray, known: int, page_ids: Sequence[int]
    ) -> None:
        """`tokens` are cached now, of which the first `known` were before; these pages are new."""
        ...

    def removed(self, node: "RadixNode", kept: int, page_ids: Sequence[int]) -> None:
        """`node`, still in its place, is about to lose its tokens from index `kept` on, and these
        pages, unless others hold them."""
        ...

    def cleared(self) -> None:
        """Everything is gone."""
        ...
