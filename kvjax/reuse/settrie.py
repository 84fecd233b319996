"""A map whose keys are sets: a trie over their elements in ascending order. Host only."""

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

Element = TypeVar("Element", str, int)
Value = TypeVar("Value")


class _Node(Generic[Element, Value]):
    """One prefix of keys; `values` has one entry where a key ends."""

    __slots__ = ("children", "values")

    def __init__(self) -> None:
        self.children: dict[Element, _Node[Element, Value]] = {}
        self.values: list[Value] = []


class SetTrie(Generic[Element, Value]):
    """Values by sets of elements. The order in which a set is written down does not matter."""

    def __init__(self) -> None:
        self._root: _Node[Element, Value] = _Node()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, key: Iterable[Element], value: Value) -> None:
        """Keeps `value` under a set, in place of an earlier one."""
        node = self._root
        for element in sorted(set(key)):
            node = node.children.setdefault(element, _Node())
        self._count += not node.values
        node.values = [value]

    def get(self, key: Iterable[Element]) -> Value | None:
        """What is kept under exactly this set."""
        node: _Node[Element, Value] | None = self._root
        for element in sorted(set(key)):
            if (node := node.children.get(element)) is None:
                return None
        return node.values[0] if node.values else None

    def largest_within(
        self, elements: Iterable[Element]
    ) -> tuple[tuple[Element, ...], Value] | None:
        """The key with most elements of which all are in `elements`, and its value; None if there
        is no such key. Of several, the one that comes first in `items`."""
        given = sorted(set(elements))
        best: tuple[tuple[Element, ...], Value] | None = None

        def descend(node: _Node[Element, Value], path: tuple[Element, ...], at: int) -> None:
            nonlocal best
            if node.values and (best is None or len(path) > len(best[0])):
                best = path, node.values[0]
            for place in range(at, len(given)):
                if best is not None and len(path) + len(given) - place <= len(best[0]):
                    return
                child = node.children.get(given[place])
                if child is not None:
                    descend(child, (*path, given[place]), place + 1)

        descend(self._root, (), 0)
        return best

    def items(self) -> Iterator[tuple[tuple[Element, ...], Value]]:
        """Keys and values, depth first: sets that begin alike are neighbours."""

        def walk(
            node: _Node[Element, Value], path: tuple[Element, ...]
        ) -> Iterator[tuple[tuple[Element, ...], Value]]:
            for value in node.values:
                yield path, value
            for element in sorted(node.children):
                yield from walk(node.children[element], (*path, element))

        return walk(self._root, ())
