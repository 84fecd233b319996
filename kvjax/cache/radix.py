"""Automatic prefix cache: a radix tree from token sequences to the pages that hold their KV.

Matching is exact to the token, pages are larger than a token, so an edge may end inside a page. A
node owns the token span [start, end) and one page id per page index that the span touches; *its*
page for an index is complete from the page's first slot up to the node's end. With 4 slots a page,
`abcdefg` cached and `abcdeXY` inserted (its writer matched 5 tokens and copied page 1 into 7):

    before      [abcd|efg]  pages 0 1          page 1: e f g .

    after       [abcd|e]    pages 0 1          page 1: e f g .   held by the parent and by `fg`
                 /     \\
             [fg]       [XY]                   page 7: e X Y .   held by `XY` alone
          pages 1     pages 7

The block table of a match takes, per page index, the page of the deepest matched node: `abcdeX` is
(0, 7), `abcdef` is (0, 1), `abcde` is (0, 1). A page has one writer and its slots are append-only,
so all its holders in a namespace lie on one path from the root. Namespaces may share pages.
"""

import dataclasses
import heapq
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from kvjax.cache.observer import TreeObserver
from kvjax.cache.pool import PagePool

_NO_TOKENS = np.empty(0, np.int64)


class LeafView(NamedTuple):
    """What an eviction policy may know about a leaf."""

    last_use: int  # logical clock of the last match or insert that touched it
    hits: int  # matches that touched it
    num_tokens: int  # in its own span
    depth: int  # tokens above it, which stay cached when it goes


class EvictionPolicy(Protocol):
    """Order in which leaves leave the cache. Pure: no clock, no state, no randomness."""

    def priority(self, leaf: LeafView) -> tuple[float, ...]:
        """Sort key of `leaf`; the smallest goes first."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class LRU:
    """Least recently used first."""

    def priority(self, leaf: LeafView) -> tuple[float, ...]:
        """The time of the last use."""
        return (leaf.last_use,)


@dataclasses.dataclass(frozen=True, slots=True)
class LFU:
    """Least often matched first; among equals the least recently used."""

    def priority(self, leaf: LeafView) -> tuple[float, ...]:
        """The number of matches, then the time of the last use."""
        return (leaf.hits, leaf.last_use)


# By the name that `EngineConfig.eviction_policy` gives; one from outside is one more row.
EVICTION_POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRU, "lfu": LFU}


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class RadixNode:
    """A token span and its pages. Opaque outside this module: a handle for `lock` and `unlock`."""

    namespace: Hashable
    parent: "RadixNode | None"  # None: a root, which has no tokens
    start: int  # index of the first token of the span
    tokens: np.ndarray  # [end - start] int64
    pages: list[int]  # of page indices start // page_size to (end - 1) // page_size
    children: "dict[int, RadixNode]" = dataclasses.field(default_factory=dict)  # by first token
    locks: int = 0  # of this node and everything below it
    hits: int = 0
    last_use: int = 0
    queued: tuple[float, ...] | None = None  # priority of its valid entry in the eviction heap
    attached: bool = True  # False: no longer in the tree

    @property
    def end(self) -> int:
        """Index after the last token of the span."""
        return self.start + len(self.tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """The longest cached prefix. Holds no references: retain the pages or lock the node at once."""

    num_tokens: int
    page_ids: tuple[int, ...]  # block table; when num_tokens ends inside the last page, copy
    # that page before writing behind num_tokens: it has another writer
    node: RadixNode


@dataclasses.dataclass(frozen=True, slots=True)
class RadixStats:
    """Counts since the tree was made."""

    queries: int = 0
    query_tokens: int = 0
    hit_tokens: int = 0
    inserted_tokens: int = 0
    evicted_pages: int = 0  # freed in the pool by `evict`


class RadixTree:
    """Longest-prefix cache over the pages of `pool`, of which it holds references of its own.

    A namespace (model, mask kind, adapter, lineage, tenant's salt, ...) has a tree of its own;
    nothing is ever found from another one. Not thread-safe. Time is a logical clock.
    """

    def __init__(self, pool: PagePool, policy: EvictionPolicy | None = None) -> None:
        self._pool, self._policy = pool, policy or LRU()
        self._page_size = pool.page_size
        self.observers: list[TreeObserver] = []
        self._roots: dict[Hashable, RadixNode] = {}
        self._held: dict[int, int] = {}  # page id -> nodes that reference it
        self._heap: list[tuple[tuple[float, ...], int, RadixNode]] = []  # lazy: see _queue
        self._num_nodes = self._num_tokens = self._clock = self._num_queued = 0
        self._queries = self._query_tokens = self._hit_tokens = 0
        self._inserted_tokens = self._evicted_pages = 0

    @property
    def num_cached_tokens(self) -> int:
        """Tokens in all spans of all namespaces."""
        return self._num_tokens

    @property
    def num_pages(self) -> int:
        """Distinct pages the tree holds."""
        return len(self._held)

    @property
    def stats(self) -> RadixStats:
        """Counts so far."""
        return RadixStats(
            self._queries,
            self._query_tokens,
            self._hit_tokens,
            self._inserted_tokens,
            self._evicted_pages,
        )

    def match(self, namespace: Hashable, tokens: Sequence[int] | np.ndarray) -> Match:
        """Longest prefix of `tokens` that is cached in `namespace`.

        Takes no references and changes nothing but the last use and hit count of what it found.
        Pass an integer array where there is one: a list costs its conversion.
        """
        query = _token_array(tokens)
        root = self._roots.get(namespace) or RadixNode(namespace, None, 0, _NO_TOKENS, [])
        deepest, num_tokens = _descend(root, query)
        self._clock += 1
        self._queries += 1
        self._query_tokens += len(query)
        self._hit_tokens += num_tokens

        stop = -(-num_tokens // self._page_size)
        table = [-1] * stop
        node = deepest
        while node.parent is not None:  # upwards, so that the deepest node fills an index first
            first = node.start // self._page_size
            table[first:stop] = node.pages[: stop - first]
            stop = first
            node.last_use = self._clock
            node.hits += 1
            node = node.parent
        self._queue(deepest)
        for observer in self.observers:
            observer.matched(table)
        return Match(num_tokens, tuple(table), deepest)

    def insert(
        self,
        namespace: Hashable,
        tokens: Sequence[int] | np.ndarray,
        page_ids: Sequence[int],
    ) -> int:
        """Records that `page_ids` (one per started page) hold the KV of `tokens`.

        What is cached already keeps the tree's pages. For the rest the tree retains the caller's
        pages, from the one that holds the first new token on; that one is complete from its first
        slot. The caller keeps its own references. Returns the number of tokens newly stored.
        """
        ids, size = _token_array(tokens), self._page_size
        if len(page_ids) != -(-len(ids) // size):
            raise ValueError(f"{len(ids)} tokens in pages of {size}: got {len(page_ids)} page ids")
        self._clock += 1
        if len(ids) == 0:
            return 0
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = RadixNode(namespace, None, 0, _NO_TOKENS, [])
        node, known = _descend(root, ids)
        if known < min(len(ids), node.end):
            node = self._split(node, known)
        for touched in _path(node):
            touched.last_use = self._clock
        if known == len(ids):
            self._queue(node)
            return 0

        pages = list(page_ids[known // size :])
        writes_on = known % size > 0 and node.pages[-1] == pages[0]  # our page, continued
        if writes_on:
            assert not any(c.pages[0] == pages[0] for c in node.children.values()), (
                f"page {pages[0]} has two contents behind token {known}: two writers share it"
            )
        untouched = known % size == 0 and node.hits == 0 and node.locks == 0
        if node.parent is not None and not node.children and (writes_on or untouched):
            node.tokens = np.concatenate((node.tokens, ids[known:]))
            fresh = pages[1:] if writes_on else pages
            node.pages += fresh
        else:
            child = RadixNode(namespace, node, known, ids[known:].copy(), pages)
            child.last_use = self._clock
            node.children[int(ids[known])] = child
            self._num_nodes += 1
            node, fresh = child, pages
        self._hold(fresh)
        self._queue(node)
        self._num_tokens += len(ids) - known
        self._inserted_tokens += len(ids) - known
        for observer in self.observers:
            observer.stored(namespace, ids, known, fresh)
        return len(ids) - known

    def lock(self, node: RadixNode) -> None:
        """Keeps `node` and all above it from `evict` and `reset`; counts, so pair with `unlock`."""
        assert node.attached, "locked a node that has left the tree: lock right after the match"
        for above in _path(node):
            above.locks += 1

    def unlock(self, node: RadixNode) -> None:
        """Takes one `lock` back. Fine after `clear`, where it has no effect on the tree."""
        for above in _path(node):
            assert above.locks > 0, "unlocked more often than locked"
            above.locks -= 1
        self._queue(node)

    def evict(self, num_pages: int) -> int:
        """Drops unlocked leaves, or only their last pages, until `num_pages` pages became free.

        Leaves go in the order of the policy; a parent follows its last child. A leaf that would
        free nothing, because running requests hold its pages, stays. Returns the number of pages
        really freed, which is smaller than asked when nothing else can go.
        """
        freed, kept = 0, []
        for node in self._candidates() if num_pages > 0 else ():
            count, cut = self._freeable_tail(node, num_pages - freed)
            if count == 0:
                if not self._frees_with_ancestors(node):
                    kept.append(node)
                    continue
                cut = 0
            self._truncate(node, cut)
            freed += count
            if freed == num_pages:
                break
        for node in kept:
            self._queue(node)
        self._evicted_pages += freed
        return freed

    def reset(self, namespace: Hashable | None = None) -> int:
        """Drops all that is not locked, of one namespace or (None) of all; returns pages freed."""
        free_before = self._pool.num_free
        for node in reversed(list(self.nodes())):  # children first; a lock covers the whole path
            if not node.locks and (namespace is None or node.namespace == namespace):
                self._truncate(node, 0)
        self._rebuild_heap()
        return self._pool.num_free - free_before

    def clear(self) -> None:
        """Drops everything, locked or not, because the device content is lost. Releases all."""
        for node in list(self.nodes()):
            node.attached = False
            self._pool.release(node.pages)
        self._roots.clear()
        self._held.clear()
        self._heap.clear()
        self._num_nodes = self._num_tokens = 0
        for observer in self.observers:
            observer.cleared()

    def check_integrity(self) -> None:
        """Asserts every invariant of the tree. Reads only; linear in tokens and pages."""
        size = self._page_size
        held: dict[int, list[RadixNode]] = {}
        index_of: dict[int, int] = {}
        num_nodes = num_tokens = 0
        assert all(root.children for root in self._roots.values()), "an empty namespace stays"
        for node in self.nodes():
            num_nodes += 1
            num_tokens += len(node.tokens)
            parent = node.parent
            assert parent is not None
            assert node.attached
            assert len(node.tokens) > 0
            assert node.namespace == parent.namespace
            assert node.start == parent.end, f"span at {node.start} after {parent.end}"
            assert parent.children[int(node.tokens[0])] is node, "child under another's token"
            first, stop = node.start // size, -(-node.end // size)
            assert len(node.pages) == stop - first, f"{node.start=} {node.end=} {node.pages=}"
            assert node.locks >= sum(child.locks for child in node.children.values())
            assert parent.parent is None or parent.last_use >= node.last_use
            assert node.children or node.locks or node.queued is not None, "a leaf is forgotten"
            for index, page in enumerate(node.pages, start=first):
                assert index_of.setdefault(page, index) == index, f"page {page} at two indices"
                held.setdefault(page, []).append(node)
        for page, holders in held.items():
            refs = self._pool.ref_count(page)
            assert refs >= len(holders), f"{page=}: {refs} references, {len(holders)} nodes"
            for namespace in {node.namespace for node in holders}:
                own = [node for node in holders if node.namespace == namespace]
                path = set(_path(max(own, key=lambda node: node.start)))
                assert all(node in path for node in own), f"page {page} on two branches"
        assert {page: len(holders) for page, holders in held.items()} == self._held
        assert (num_nodes, num_tokens) == (self._num_nodes, self._num_tokens)

    def _split(self, node: RadixNode, at: int) -> RadixNode:
        """Cuts `node` at token `at`; returns the new upper part. `node` stays the lower part, so
        that handles keep covering what they covered. Both reference the page that is cut."""
        assert node.parent is not None
        size, offset = self._page_size, at - node.start
        first, inside = node.start // size, at // size - node.start // size
        upper = dataclasses.replace(
            node,
            tokens=node.tokens[:offset],
            pages=node.pages[: -(-at // size) - first],
            children={int(node.tokens[offset]): node},
            queued=None,
        )
        node.parent.children[int(node.tokens[0])] = upper
        node.parent, node.start = upper, at
        node.tokens, node.pages = node.tokens[offset:], node.pages[inside:]
        self._num_nodes += 1
        if at % size:
            self._pool.retain(node.pages[:1])
            self._held[node.pages[0]] += 1
        self._queue(node)
        return upper

    def _hold(self, pages: list[int]) -> None:
        self._pool.retain(pages)
        held = self._held
        for page in pages:
            held[page] = held.get(page, 0) + 1

    def _truncate(self, node: RadixNode, cut: int) -> None:
        """Drops the pages of a leaf from the `cut`-th on; at 0 the whole leaf."""
        assert not node.children, "only leaves go"
        dropped, held = node.pages[cut:], self._held
        kept = max((node.start // self._page_size + cut) * self._page_size, node.start)
        for observer in self.observers:
            observer.removed(node, kept, dropped)
        for page in dropped:
            held[page] -= 1
            if held[page] == 0:
                del held[page]
        self._pool.release(dropped)
        if cut:
            num_kept = (node.start // self._page_size + cut) * self._page_size - node.start
            self._num_tokens -= len(node.tokens) - num_kept
            node.tokens = node.tokens[:num_kept]
            del node.pages[cut:]
            self._queue(node)
            return
        parent = node.parent
        assert parent is not None
        node.attached, node.queued = False, None
        self._num_nodes -= 1
        self._num_tokens -= len(node.tokens)
        del parent.children[int(node.tokens[0])]
        if not parent.children and parent.parent is None:
            self._roots.pop(parent.namespace, None)
        self._queue(parent)

    # The heap holds (priority, tie break, leaf). An entry is valid while the leaf's `queued` is its
    # priority; a priority that fell is pushed again, one that rose is corrected when it surfaces.
    # Between calls every unlocked leaf has a valid entry.

    def _queue(self, node: RadixNode) -> None:
        if node.children or node.locks or node.parent is None or not node.attached:
            return
        priority = self._priority(node)
        if node.queued is None or priority < node.queued:
            node.queued = priority
            self._num_queued += 1
            heapq.heappush(self._heap, (priority, self._num_queued, node))
            if len(self._heap) > 2 * self._num_nodes + 64:
                self._rebuild_heap()

    def _rebuild_heap(self) -> None:
        valid = {entry[2]: entry for entry in self._heap if entry[2].queued == entry[0]}
        self._heap = list(valid.values())
        heapq.heapify(self._heap)

    def _priority(self, node: RadixNode) -> tuple[float, ...]:
        return self._policy.priority(
            LeafView(node.last_use, node.hits, len(node.tokens), node.start)
        )

    def _candidates(self) -> Iterator[RadixNode]:
        """Pops unlocked leaves in the order of the policy; one that stays must be queued again."""
        while self._heap:
            queued, _, node = heapq.heappop(self._heap)
            if node.queued != queued:
                continue
            node.queued = None
            if node.children or node.locks or not node.attached:
                continue
            if self._priority(node) > queued:
                self._queue(node)
                continue
            yield node

    def _freeable_tail(self, node: RadixNode, wanted: int) -> tuple[int, int]:
        """(n, cut): dropping pages[cut:] frees n <= wanted pages, and no larger cut does."""
        count, cut = 0, len(node.pages)
        for index in range(len(node.pages) - 1, -1, -1):
            if self._pool.ref_count(node.pages[index]) == 1:
                count, cut = count + 1, index
                if count == wanted:
                    break
        return count, cut

    def _frees_with_ancestors(self, leaf: RadixNode) -> bool:
        """Whether only nodes of the tree share the leaf's pages, which are free once they go, too.

        Such a leaf goes at its turn though it frees nothing by itself: else those that share pages
        with an ancestor or another namespace keep each other alive.
        """
        if any(self._pool.ref_count(page) > self._held[page] for page in leaf.pages):
            return False
        page = leaf.pages[0]
        num_holders = self._held[page] if len(leaf.pages) == 1 else 0  # else: another namespace's
        for node in _path(leaf):  # whatever is above and reaches this page has it as its last
            if node.parent is None or num_holders == 0:
                break
            num_holders -= node.pages[-1] == page
            if num_holders == 0:
                return node.locks == 0
        return True  # whoever else holds it is in another namespace

    def nodes(self) -> Iterator[RadixNode]:
        """Every node with tokens, parents first. Not while the tree changes."""
        for root in self._roots.values():
            for node in _subtree(root):
                if node is not root:
                    yield node


def _token_array(tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    array = np.asarray(tokens, dtype=np.int64)
    if array.ndim != 1:
        raise ValueError(f"expected a flat sequence of token ids, got {array.shape=}")
    return array


def _descend(root: RadixNode, query: np.ndarray) -> tuple[RadixNode, int]:
    """The deepest node that shares at least one token with `query`, and the tokens matched."""
    node, matched = root, 0
    while matched < len(query):
        child = node.children.get(int(query[matched]))
        if child is None:
            break
        length = min(len(child.tokens), len(query) - matched)
        differs = child.tokens[:length] != query[matched : matched + length]
        node = child
        matched += int(differs.argmax()) or length  # 0 is no difference: the first token is equal
        if matched < child.end:
            break
    return node, matched


def _subtree(node: RadixNode) -> Iterator[RadixNode]:
    """`node` and all below it, parents first."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())


def _path(node: RadixNode | None) -> Iterator[RadixNode]:
    while node is not None:
        yield node
        node = node.parent
