import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache.chunks import (
    CHUNK_EVICTION_POLICIES,
    PROTECTED_SHARE,
    ChunkStore,
    Variant,
    VariantKey,
    tokens_hash,
)
from kvjax.cache.pool import PagePool
from kvjax.errors import UnknownChunk


def stored(store: ChunkStore, pool: PagePool, number: int, pages: int = 2) -> Variant | None:
    """A chunk of its own, whose encoder gives its pages back at once."""
    tokens = np.full(pages * pool.page_size, number)
    ids = pool.allocate(pages)
    variant = Variant(VariantKey(None, tokens_hash(tokens), ""), tokens, 0, ids, 0)
    admitted = store.put(variant)
    pool.release(ids)
    return variant if admitted else None


def test_slots_follow_the_pages_from_the_first_offset():
    variant = Variant(VariantKey(None, "", ""), np.arange(20), 5, [7, 3], first=5)
    assert variant.slots(0, 3, 16).tolist() == [7 * 16 + 5, 7 * 16 + 6, 7 * 16 + 7]
    assert variant.slots(10, 13, 16).tolist() == [7 * 16 + 15, 3 * 16, 3 * 16 + 1]


def test_equal_tokens_of_two_tenants_are_two_chunks():
    pool = PagePool(8, 16)
    store = ChunkStore(pool, 8)
    tokens = np.arange(16)
    pages = pool.allocate(1)
    store.put(Variant(VariantKey("a", tokens_hash(tokens), ""), tokens, 0, pages, 0))
    assert store.variants("a", tokens_hash(tokens))
    assert not store.variants("b", tokens_hash(tokens))
    assert not store.variants(None, tokens_hash(tokens))


def test_novel_chunks_do_not_flush_those_in_use():
    pool = PagePool(100, 16)
    store = ChunkStore(pool, 20)
    warm = [stored(store, pool, n) for n in range(5)]
    for variant in warm:
        assert variant is not None
        store.use(variant)
    for novel in range(100, 150):
        stored(store, pool, novel)
        store.check_integrity()
    assert all(v is not None and store.get(v.key) is v for v in warm)
    assert store.num_pages <= store.capacity_pages
    assert store.stats.evicted > 0


def test_used_chunks_yield_what_is_above_their_share():
    pool = PagePool(100, 16)
    store = ChunkStore(pool, 20)
    warm = [stored(store, pool, n) for n in range(10)]
    for variant in warm:
        assert variant is not None
        store.use(variant)
    assert stored(store, pool, 100) is not None
    kept = sum(v is not None and store.get(v.key) is v for v in warm)
    assert kept * 2 >= int(PROTECTED_SHARE * 20)


def test_a_pinned_chunk_never_leaves_and_an_unknown_one_cannot_be_pinned():
    pool = PagePool(20, 16)
    store = ChunkStore(pool, 4)
    first = stored(store, pool, 1)
    assert first is not None
    assert store.pin(None, first.key.chunk) == 1
    for number in range(2, 9):
        stored(store, pool, number)
    assert store.get(first.key) is first
    store.evict(100)
    assert store.get(first.key) is first
    store.pin(None, first.key.chunk, by=-1)
    store.evict(100)
    assert store.get(first.key) is None
    with pytest.raises(UnknownChunk, match="no KV is stored"):
        store.pin(None, "0" * 32)


def test_what_is_larger_than_the_store_is_refused_and_nothing_is_lost():
    pool = PagePool(20, 16)
    store = ChunkStore(pool, 3)
    small = stored(store, pool, 1)
    assert stored(store, pool, 2, pages=4) is None
    assert small is not None
    assert store.get(small.key) is small
    assert store.stats.refused == 1


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(CHUNK_EVICTION_POLICIES)),
    st.lists(st.tuples(st.sampled_from(["p", "t", "seevictpin"]), st.integers(0, 6)), max_size=40),
)
def test_pages_are_never_lost_whatever_happens(policy, actions):
    pool = PagePool(64, 16)
    store = ChunkStore(pool, 10, CHUNK_EVICTION_POLICIES[policy])
    known: dict[int, Variant] = {}
    for action, number in actions:
        variant = known.get(number)
        if action.startswith("p"):
            variant = stored(store, pool, number, pages=1 + number % 3)
            if variant is not None:
                known[number] = variant
        elif variant is not None and store.get(variant.key) is variant:
            store.use(variant)
        else:
            store.evict(number)
        store.check_integrity()
        pool.check_integrity()
        assert store.num_pages <= store.capacity_pages
    store.clear()
    assert pool.num_free == 64
