"""The radix tree against a naive model of what every slot of every page holds."""

import dataclasses

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvjax.cache.pool import PagePool
from kvjax.cache.radix import RadixNode, RadixTree

PAGE = 4
NUM_PAGES = 20
TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=9)
NAMESPACES = st.sampled_from(["red", "blue"])


@dataclasses.dataclass
class Running:
    """A request: what it has written so far, and the references it took."""

    namespace: str
    tokens: list[int]
    pages: list[int]
    writable: set[int]  # pages it is the writer of
    node: RadixNode | None = None  # locked


class TreeAgainstSlots(RuleBasedStateMachine):
    """Engines in miniature over a simulated device.

    `content[page]` lists what each written slot holds. KV depends on everything before it, so a
    slot's value is (namespace, all tokens up to it): a hit is right if and only if these agree.
    `stored` is the naive cache: the set of (namespace, prefix) that a match must find.
    """

    def __init__(self):
        super().__init__()
        self.pool = PagePool(NUM_PAGES, PAGE)
        self.tree = RadixTree(self.pool)
        self.content: dict[int, list] = {}
        self.stored: set[tuple[str, tuple[int, ...]]] = set()
        self.running: list[Running] = []
        self.locked: list[tuple] = []

    # -- the engine in miniature

    def _allocate(self, count):
        """New, empty pages, evicting when short; None when that does not help."""
        if count > self.pool.num_free:
            self._evict(count - self.pool.num_free)
        if count > self.pool.num_free:
            return None
        pages = self.pool.allocate(count)
        for page in pages:
            self.content[page] = []
        return pages

    def _write(self, request, tokens):
        """Appends tokens; copies the partial page if another writes it. Stops when out of pages."""
        for token in tokens:
            index, offset = divmod(len(request.tokens), PAGE)
            if offset == 0 or request.pages[index] not in request.writable:
                new = self._allocate(1)
                if new is None:
                    return
                if offset:
                    shared = request.pages.pop()
                    self.content[new[0]] = self.content[shared][:offset]
                    self.pool.release([shared])
                request.pages += new
                request.writable |= set(new)
            request.tokens.append(token)
            slots = self.content[request.pages[index]]
            assert len(slots) == offset, "slots are append-only"
            slots.append((request.namespace, tuple(request.tokens)))

    def _check_match(self, namespace, tokens):
        match = self.tree.match(namespace, tokens)
        expected = max(
            (n for n in range(len(tokens) + 1) if (namespace, tuple(tokens[:n])) in self.stored),
            default=0,
        )
        assert match.num_tokens == expected
        assert len(match.page_ids) == -(-expected // PAGE)
        for n in range(expected):
            page, offset = match.page_ids[n // PAGE], n % PAGE
            assert self.content[page][offset] == (namespace, tuple(tokens[: n + 1]))
            assert self.pool.ref_count(page) > 0
        return match

    def _forget_dropped(self):
        """After an eviction, `stored` is what is still found; prefixes of locked nodes must be."""
        before, self.stored = self.stored, set()
        for namespace, prefix in before:
            num_tokens = self.tree.match(namespace, prefix).num_tokens
            self.stored |= {(namespace, prefix[:n]) for n in range(1, num_tokens + 1)}
        assert self.stored <= before
        for namespace, prefix in self.stored:
            self._check_match(namespace, prefix)
        for namespace, prefix, page_ids, _ in self.locked:
            match = self.tree.match(namespace, prefix)
            assert (match.num_tokens, match.page_ids) == (len(prefix), page_ids)

    def _evict(self, num_pages):
        free = self.pool.num_free
        pinned = {page for request in self.running for page in request.pages}
        evictable = self.tree.num_pages
        freed = self.tree.evict(num_pages)
        assert freed == self.pool.num_free - free
        assert freed <= num_pages
        if not pinned and not self.locked:
            assert freed == min(num_pages, evictable)
        self._forget_dropped()

    # -- requests

    @precondition(lambda self: len(self.running) < 5)
    @rule(namespace=NAMESPACES, prompt=TEXTS, lock=st.booleans())
    def start(self, namespace, prompt, lock):
        match = self._check_match(namespace, prompt)
        self.pool.retain(match.page_ids)
        request = Running(namespace, prompt[: match.num_tokens], list(match.page_ids), set())
        if lock:
            self.tree.lock(match.node)
            request.node = match.node
            self.locked.append((namespace, tuple(request.tokens), match.page_ids, request.node))
        self.running.append(request)
        self._write(request, prompt[match.num_tokens :])

    @precondition(lambda self: self.stored)
    @rule(data=st.data(), suffix=TEXTS, branches=st.integers(1, 3), insert=st.booleans())
    def branch_off(self, data, suffix, branches, insert):
        """Requests that leave a cached prefix at some token, side by side."""
        namespace, prefix = data.draw(st.sampled_from(sorted(self.stored)))
        for branch in range(branches):
            if len(self.running) < 5:
                self.start(namespace, [*prefix, branch, *suffix], lock=False)
                if insert:
                    self._insert(self.running[-1], len(self.running[-1].tokens))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), tokens=TEXTS)
    def decode(self, data, tokens):
        self._write(data.draw(st.sampled_from(self.running)), tokens[:5])

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def insert(self, data):
        request = data.draw(st.sampled_from(self.running))
        self._insert(request, data.draw(st.integers(0, len(request.tokens))))

    def _insert(self, request, num_tokens):
        tokens = request.tokens[:num_tokens]
        prefixes = {(request.namespace, tuple(tokens[:n])) for n in range(1, num_tokens + 1)}
        pages = request.pages[: -(-num_tokens // PAGE)]
        stored = self.tree.insert(request.namespace, tokens, pages)
        assert stored == len(prefixes - self.stored)
        self.stored |= prefixes
        self._check_match(request.namespace, tokens)

    @precondition(lambda self: 0 < len(self.running) < 5)
    @rule(data=st.data())
    def fork(self, data):
        parent = data.draw(st.sampled_from(self.running))
        self.pool.retain(parent.pages)
        self.running.append(
            Running(parent.namespace, list(parent.tokens), list(parent.pages), set())
        )

    @precondition(lambda self: self.running)
    @rule(data=st.data(), insert=st.booleans())
    def finish(self, data, insert):
        request = data.draw(st.sampled_from(self.running))
        if insert:
            self._insert(request, len(request.tokens))
        self._stop(request)

    def _stop(self, request):
        self.running = [other for other in self.running if other is not request]
        self.pool.release(request.pages)
        if request.node is not None:
            self.tree.unlock(request.node)
            at = next(i for i, lock in enumerate(self.locked) if lock[3] is request.node)
            del self.locked[at]

    # -- the cache

    @rule(namespace=NAMESPACES, tokens=TEXTS)
    def match(self, namespace, tokens):
        self._check_match(namespace, tokens)

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def match_what_is_stored(self, data):
        namespace, prefix = data.draw(st.sampled_from(sorted(self.stored)))
        self._check_match(namespace, prefix)

    @precondition(lambda self: len(self.stored) > 12)
    @rule(num_pages=st.integers(0, NUM_PAGES))
    def evict(self, num_pages):
        self._evict(num_pages)

    @precondition(lambda self: len(self.stored) > 20)
    @rule(namespace=st.sampled_from([None, "red", "blue"]))
    def reset(self, namespace):
        free = self.pool.num_free
        assert self.tree.reset(namespace) == self.pool.num_free - free
        kept = {entry for entry in self.stored if namespace not in (None, entry[0])}
        self._forget_dropped()
        assert kept <= self.stored
        if not self.locked:
            assert all(entry[0] != namespace for entry in self.stored)
            assert namespace is not None or self.tree.num_cached_tokens == 0

    @precondition(lambda self: len(self.stored) > 25)
    @rule()
    def lose_the_device(self):
        self.tree.clear()
        self.stored.clear()
        self.locked.clear()
        assert (self.tree.num_pages, self.tree.num_cached_tokens) == (0, 0)
        for request in self.running:
            self.pool.release(request.pages)
            if request.node is not None:
                self.tree.unlock(request.node)
        self.running.clear()
        assert self.pool.num_free == NUM_PAGES

    @invariant()
    def is_sound(self):
        self.tree.check_integrity()
        self.pool.check_integrity()
        assert self.tree.num_cached_tokens == len(self.stored)
        for page in range(NUM_PAGES):
            assert sum(page in request.writable for request in self.running) <= 1

    def teardown(self):
        """Nothing leaks: once the requests are gone, eviction alone gives every page back."""
        for request in list(self.running):
            self._stop(request)
        self.tree.evict(NUM_PAGES)
        assert self.pool.num_free == NUM_PAGES
        assert self.tree.num_cached_tokens == 0
        self.tree.check_integrity()


TestTreeAgainstSlots = TreeAgainstSlots.TestCase
TestTreeAgainstSlots.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
