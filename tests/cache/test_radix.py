import dataclasses

import numpy as np
import pytest

from kvjax.cache.pool import PagePool
from kvjax.cache.radix import EVICTION_POLICIES, LFU, LRU, LeafView, RadixTree

PAGE = 4


def tokens_of(text):
    return [ord(letter) for letter in text]


class Cache:
    """A tree over a small pool, with strings for token sequences."""

    def __init__(self, num_pages=32, policy=None):
        self.pool = PagePool(num_pages, PAGE)
        self.tree = RadixTree(self.pool, policy)

    def store(self, text, pages=None, namespace="ns"):
        """Inserts with `pages` (or new ones), drops the writer's references; returns the pages."""
        missing = -(-len(text) // PAGE) - len(pages or [])
        table = list(pages or []) + self.pool.allocate(missing)
        self.pool.retain(pages or [])
        self.tree.insert(namespace, tokens_of(text), table)
        self.tree.check_integrity()
        self.pool.release(table)
        return table

    def match(self, text, namespace="ns"):
        return self.tree.match(namespace, tokens_of(text))

    def length(self, text, namespace="ns"):
        return self.match(text, namespace).num_tokens


@pytest.fixture
def cache():
    return Cache()


def test_an_empty_tree_matches_nothing(cache):
    match = cache.match("abc")
    assert (match.num_tokens, match.page_ids) == (0, ())
    cache.tree.lock(match.node)
    cache.tree.unlock(match.node)
    assert cache.length("") == 0
    assert cache.tree.insert("ns", [], []) == 0
    cache.tree.check_integrity()


def test_a_match_ends_inside_a_node_at_the_token_and_keeps_the_partial_page(cache):
    pages = cache.store("abcdefghij")
    match = cache.match("abcdefXY")
    assert match.num_tokens == 6
    assert match.page_ids == tuple(pages[:2])
    assert cache.match("abcdZ").page_ids == tuple(pages[:1])
    assert cache.match("abcdefghij-and-more").page_ids == tuple(pages)


def test_a_split_inside_a_page_gives_each_child_its_own_page(cache):
    old = cache.store("abcdefg")
    new = cache.store("abcdeXY", pages=[old[0]])
    assert cache.match("abcdefg").page_ids == (old[0], old[1])
    assert cache.match("abcdeXY").page_ids == (old[0], new[1])
    assert cache.match("abcde").page_ids == (old[0], old[1])
    assert cache.pool.ref_count(old[0]) == 1  # only the parent
    assert cache.pool.ref_count(old[1]) == 2  # the parent and the old child
    assert cache.pool.ref_count(new[1]) == 1
    assert (cache.tree.num_pages, cache.tree.num_cached_tokens) == (3, 9)


def test_a_split_at_a_page_end_shares_no_page(cache):
    old = cache.store("abcdefg")
    new = cache.store("abcdXYZ", pages=[old[0]])
    assert [cache.pool.ref_count(page) for page in (*old, new[1])] == [1, 1, 1]


def test_cached_tokens_keep_the_pages_of_the_tree(cache):
    first = cache.store("abcdefgh")
    second = cache.store("abcdefghij")  # the same prefix, computed twice
    assert cache.match("abcdefghij").page_ids == (*first, second[2])
    assert cache.pool.ref_count(second[0]) == 0


def test_a_writer_extends_its_leaf_in_place_within_the_partial_page(cache):
    pages = cache.pool.allocate(3)
    assert cache.tree.insert("ns", tokens_of("abcdef"), pages[:2]) == 6
    assert cache.tree.insert("ns", tokens_of("abcdefghij"), pages) == 4
    cache.tree.check_integrity()
    assert cache.match("abcdefghij").page_ids == tuple(pages)
    assert [cache.pool.ref_count(page) for page in pages] == [2, 2, 2]  # one node, one writer


def test_a_writer_goes_on_in_its_page_after_another_branched_off(cache):
    mine = cache.pool.allocate(2)
    cache.tree.insert("ns", tokens_of("abcde"), mine)
    other = cache.store("abcdeXY", pages=[mine[0]])
    cache.tree.insert("ns", tokens_of("abcdefg"), mine)
    cache.tree.check_integrity()
    assert cache.match("abcdefg").page_ids == tuple(mine)
    assert cache.match("abcdeXY").page_ids == (mine[0], other[1])
    assert cache.pool.ref_count(mine[1]) == 3  # parent, its child, the writer


def test_a_copied_page_may_meet_the_original_again_further_down(cache):
    mine = cache.pool.allocate(2)
    cache.tree.insert("ns", tokens_of("abcde"), mine)
    copy = cache.store("abcdef", pages=[mine[0]])[1]
    cache.tree.insert("ns", tokens_of("abcdefg"), mine)  # `f` stays on the copy, `g` is on ours
    cache.tree.check_integrity()
    assert cache.match("abcde").page_ids == (mine[0], mine[1])
    assert cache.match("abcdef").page_ids == (mine[0], copy)
    assert cache.match("abcdefg").page_ids == (mine[0], mine[1])
    cache.pool.release(mine)
    assert cache.tree.evict(32) == 3
    assert cache.pool.num_free == 32


def test_two_writers_on_one_page_are_a_bug(cache):
    pages = cache.pool.allocate(2)
    cache.tree.insert("ns", tokens_of("abcdefg"), pages)
    with pytest.raises(AssertionError, match="two writers"):
        cache.tree.insert("ns", tokens_of("abcdeX"), pages)


def test_a_wrong_number_of_pages_is_refused(cache):
    with pytest.raises(ValueError, match="5 tokens in pages of 4: got 1"):
        cache.tree.insert("ns", tokens_of("abcde"), [0])


def test_tokens_are_a_flat_sequence(cache):
    with pytest.raises(ValueError, match="shape"):
        cache.tree.match("ns", np.zeros((2, 3), np.int32))


def test_the_tree_does_not_alias_the_array_of_the_caller(cache):
    tokens = np.arange(8)
    cache.tree.insert("ns", tokens, cache.pool.allocate(2))
    tokens[:] = 0
    assert cache.tree.match("ns", np.arange(8, dtype=np.int32)).num_tokens == 8


def test_another_namespace_is_never_hit(cache):
    mine = cache.store("abcdefgh", namespace=("model", "salt-1"))
    theirs = cache.store("abcdefgh", namespace=("model", "salt-2"))
    assert cache.match("abcdefgh", ("model", "salt-1")).page_ids == tuple(mine)
    assert cache.match("abcdefgh", ("model", "salt-2")).page_ids == tuple(theirs)
    assert cache.length("abcdefgh", ("model", "salt-3")) == 0
    assert cache.tree.reset(("model", "salt-1")) == 2
    assert cache.length("abcdefgh", ("model", "salt-1")) == 0
    assert cache.length("abcdefgh", ("model", "salt-2")) == 8


def test_evicting_a_leaf_returns_exactly_its_pages(cache):
    old = cache.store("abcdefghijkl")
    new = cache.store("abcdefgXYZUV", pages=[old[0]])
    cache.match("abcdefghijkl")
    free = cache.pool.num_free
    assert cache.tree.evict(2) == 2
    assert cache.pool.num_free == free + 2
    assert [cache.pool.ref_count(page) for page in new[1:]] == [0, 0]
    assert cache.match("abcdefghijkl").page_ids == tuple(old)
    assert cache.length("abcdefgXYZUV") == 7
    cache.tree.check_integrity()


def test_only_the_tail_of_a_leaf_goes_when_that_is_enough(cache):
    pages = cache.store("abcdefghijklmn")
    assert cache.tree.evict(2) == 2
    cache.tree.check_integrity()
    assert cache.match("abcdefghijklmn").num_tokens == 8
    assert cache.match("abcdefghijklmn").page_ids == tuple(pages[:2])


def test_a_parent_follows_its_last_child(cache):
    old = cache.store("abcdefgh")
    cache.store("abcdXYZU", pages=[old[0]])
    assert cache.tree.evict(32) == 3
    assert (cache.pool.num_free, cache.tree.num_pages, cache.tree.num_cached_tokens) == (32, 0, 0)
    cache.tree.check_integrity()


def test_a_page_shared_by_parent_and_child_is_freed_with_the_parent(cache):
    old = cache.store("abcdefg")
    cache.store("abcdeXY", pages=[old[0]])
    assert cache.tree.evict(1) == 1  # `fg` frees nothing by itself, then `XY` its page
    assert cache.length("abcdefg") == 5
    assert cache.tree.evict(1) == 1
    assert cache.length("abcdefg") == 4
    assert cache.pool.ref_count(old[1]) == 0


def test_branches_that_share_pages_with_ancestors_do_not_keep_each_other_alive(cache):
    mine = cache.pool.allocate(2)
    cache.tree.insert("ns", tokens_of("abcde"), mine)
    copy = [mine[0], *cache.pool.allocate(1)]
    cache.tree.insert("ns", tokens_of("abcdef"), copy)
    cache.tree.insert("ns", tokens_of("abcdefX"), mine)
    cache.tree.insert("ns", tokens_of("abcdefY"), copy)
    cache.tree.check_integrity()
    cache.pool.release([*mine, copy[1]])
    assert cache.tree.evict(32) == 3
    assert cache.pool.num_free == 32


def test_a_leaf_on_a_page_of_a_locked_ancestor_stays(cache):
    old = cache.store("abcdefg")
    cache.store("abcdeXY", pages=[old[0]])
    match = cache.match("abcdeXY")
    cache.tree.lock(match.node)
    assert cache.tree.evict(32) == 0
    assert cache.length("abcdefg") == 7
    cache.tree.unlock(match.node)


def test_a_locked_path_survives_and_goes_after_the_unlock(cache):
    pages = cache.store("abcdefghij")
    cache.store("zzzz")
    match = cache.match("abcdefXX")
    cache.tree.lock(match.node)
    cache.tree.lock(match.node)
    cache.store("abcXXXXX")  # splits the locked node
    assert cache.tree.evict(32) == 3  # zzzz, and the two pages of the new child
    assert cache.match("abcdefghij").page_ids == tuple(pages)
    cache.tree.unlock(match.node)
    assert cache.tree.evict(32) == 0
    assert cache.tree.reset() == 0
    cache.tree.unlock(match.node)
    assert cache.tree.evict(32) == 3
    assert cache.pool.num_free == 32
    with pytest.raises(AssertionError, match="more often"):
        cache.tree.unlock(match.node)


def test_a_locked_leaf_survives_under_a_policy_that_wants_it_gone():
    cache = Cache(policy=MostRecent())
    cache.store("abcd")
    cache.store("zzzz")
    match = cache.match("abcd")
    cache.tree.lock(match.node)
    assert cache.tree.evict(1) == 1
    assert (cache.length("abcd"), cache.length("zzzz")) == (4, 0)
    cache.tree.unlock(match.node)
    assert cache.tree.evict(1) == 1


def test_a_node_that_left_the_tree_cannot_be_locked(cache):
    cache.store("abcd")
    match = cache.match("abcd")
    cache.tree.evict(1)
    with pytest.raises(AssertionError, match="left the tree"):
        cache.tree.lock(match.node)


def test_a_leaf_that_would_free_nothing_is_not_lost(cache):
    pages = cache.store("abcdefgh")
    cache.pool.retain(pages)  # a running request
    cache.store("zzzz")
    assert cache.tree.evict(32) == 1
    assert cache.length("abcdefgh") == 8
    cache.pool.release(pages)
    assert cache.tree.evict(32) == 2


def test_the_pages_a_request_holds_at_the_head_of_a_leaf_stay_cached(cache):
    pages = cache.store("abcdefghijkl")
    cache.pool.retain(pages[:1])
    assert cache.tree.evict(32) == 2
    assert cache.length("abcdefghijkl") == 4


def test_reset_keeps_what_is_locked_and_clear_keeps_nothing(cache):
    pages = cache.store("abcdefghij")
    cache.store("abcdefXX", pages=pages[:1])
    match = cache.match("abcdefgh")
    cache.tree.lock(match.node)
    assert cache.tree.reset() == 1
    cache.tree.check_integrity()
    assert cache.length("abcdefghij") == 10
    cache.tree.clear()
    cache.tree.check_integrity()
    assert (cache.length("abcdefghij"), cache.pool.num_free) == (0, 32)
    cache.tree.unlock(match.node)  # a request that was running when the device was lost
    cache.store("abcdefghij")
    assert cache.length("abcdefghij") == 10


def test_references_of_running_requests_outlive_clear(cache):
    pages = cache.pool.allocate(2)
    cache.tree.insert("ns", tokens_of("abcdefgh"), pages)
    cache.tree.clear()
    assert [cache.pool.ref_count(page) for page in pages] == [1, 1]


def test_a_prompt_is_one_node_however_long_it_is():
    pool = PagePool(700, 16)
    tree = RadixTree(pool)
    tokens = np.arange(10_000)
    pages = pool.allocate(625)
    for stop in (4_000, 4_001, 8_192, 10_000):  # chunked prefill
        tree.insert("ns", tokens[:stop], pages[: -(-stop // 16)])
    tree.check_integrity()
    match = tree.match("ns", tokens)
    assert match.page_ids == tuple(pages)
    assert match.node.parent is not None
    assert match.node.parent.parent is None


def test_the_statistics_count_tokens_and_freed_pages(cache):
    cache.store("abcdefgh")
    cache.match("abcdXX")
    cache.match("zz")
    cache.tree.evict(1)
    stats = cache.tree.stats
    assert dataclasses.astuple(stats) == (2, 8, 4, 8, 1)


class MostRecent:
    """A policy under which use makes a leaf go sooner."""

    def priority(self, leaf: LeafView) -> tuple[float, ...]:
        return (-leaf.last_use,)


@pytest.mark.parametrize("policy", [LRU(), LFU(), MostRecent()], ids=lambda p: type(p).__name__)
def test_leaves_go_in_the_order_of_the_policy(policy):
    rng = np.random.default_rng(0)
    num_leaves = 40
    cache = Cache(num_leaves, policy)
    uses = {}
    for leaf in range(num_leaves):
        cache.store(chr(200 + leaf) * PAGE)
        uses[leaf] = (leaf, 0)
    for time, leaf in enumerate(rng.integers(0, num_leaves, 300).tolist(), start=num_leaves):
        assert cache.length(chr(200 + leaf) * PAGE) == PAGE
        uses[leaf] = (time, uses[leaf][1] + 1)
    order = sorted(
        uses, key=lambda leaf: policy.priority(LeafView(uses[leaf][0], uses[leaf][1], PAGE, 0))
    )
    for gone in order:
        free = cache.pool.num_free
        assert cache.tree.evict(1) == 1
        assert cache.pool.num_free == free + 1
        assert cache.length(chr(200 + gone) * PAGE) == 0
        cache.tree.check_integrity()


def test_policies_have_names():
    assert {name: make() for name, make in EVICTION_POLICIES.items()} == {
        "lru": LRU(),
        "lfu": LFU(),
    }


def test_the_eviction_queue_stays_proportional_to_the_tree():
    cache = Cache(8, MostRecent())
    for _ in range(3):
        cache.store("abcdefgh")
        for _ in range(500):
            cache.match("abcdefgh")
        assert len(cache.tree._heap) <= 2 * 1 + 65
        cache.tree.reset()
        assert not cache.tree._heap
