import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvjax.cache.pool import PagePool
from kvjax.errors import OutOfPages

NUM_PAGES = 6


def test_allocation_is_all_or_nothing():
    pool = PagePool(4, 16)
    pool.allocate(3)
    with pytest.raises(OutOfPages) as refusal:
        pool.allocate(2)
    assert (refusal.value.wanted, refusal.value.free, pool.num_free) == (2, 1, 1)


def test_nothing_can_be_allocated_from_a_full_pool():
    pool = PagePool(0, 16)
    assert pool.allocate(0) == []


def test_a_page_is_free_when_its_last_user_releases_it():
    pool = PagePool(2, 16)
    pages = pool.allocate(1)
    pool.retain(pages)
    pool.release(pages)
    assert (pool.ref_count(pages[0]), pool.num_free) == (1, 1)
    pool.release(pages)
    assert (pool.ref_count(pages[0]), pool.num_free) == (0, 2)


def test_freed_pages_are_reused_last_in_first_out_and_before_any_fresh_page():
    pool = PagePool(5, 16)
    assert pool.allocate(3) == [0, 1, 2]
    pool.release([1])
    pool.release([2, 0])
    assert pool.allocate(5) == [0, 2, 1, 3, 4]


def test_releasing_or_retaining_a_free_page_is_a_bug():
    pool = PagePool(2, 16)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(pages)
    with pytest.raises(AssertionError, match="retained while free"):
        pool.retain(pages)


def test_a_lease_returns_its_pages_when_the_block_raises():
    pool = PagePool(3, 16)
    with pytest.raises(ZeroDivisionError), pool.lease(2) as lease:
        assert len(lease.pages) / pool.ref_count(2)
    assert pool.num_free == 3


def test_kept_pages_outlive_the_lease():
    pool = PagePool(3, 16)
    with pool.lease(2) as lease:
        pages = lease.keep()
    assert pool.num_free == 1
    pool.release(pages)
    assert pool.num_free == 3


def test_a_refused_lease_takes_nothing():
    pool = PagePool(3, 16)
    with pytest.raises(OutOfPages), pool.lease(4):
        pass
    assert pool.num_free == 3


def test_an_unentered_lease_takes_nothing():
    pool = PagePool(3, 16)
    pool.lease(2)
    assert pool.num_free == 3


@pytest.mark.parametrize(("num_pages", "page_size"), [(-1, 16), (4, 0)])
def test_impossible_sizes_are_refused(num_pages, page_size):
    with pytest.raises(ValueError, match="num_pages"):
        PagePool(num_pages, page_size)


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="-1"):
        PagePool(4, 16).allocate(-1)


class PoolAgainstLists(RuleBasedStateMachine):
    """The model is a list of free pages in reuse order and a list of references taken."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(NUM_PAGES, 16)
        self.free = list(range(NUM_PAGES))
        self.taken: list[int] = []

    def _give_back(self, page):
        self.taken.remove(page)
        if page not in self.taken:
            self.free.insert(0, page)

    @rule(count=st.integers(0, NUM_PAGES))
    def allocate(self, count):
        if count > len(self.free):
            with pytest.raises(OutOfPages):
                self.pool.allocate(count)
            return
        expected, self.free = self.free[:count], self.free[count:]
        assert self.pool.allocate(count) == expected
        self.taken += expected

    @rule(data=st.data())
    def retain(self, data):
        pages = data.draw(
            st.lists(st.sampled_from(self.taken), max_size=4) if self.taken else EMPTY
        )
        self.pool.retain(pages)
        self.taken += pages

    @rule(data=st.data())
    def release(self, data):
        order = data.draw(st.permutations(self.taken))
        pages = order[: data.draw(st.integers(0, len(order)))]
        self.pool.release(pages)
        for page in pages:
            self._give_back(page)

    @rule(count=st.integers(0, NUM_PAGES), keep=st.booleans())
    def lease(self, count, keep):
        if count > len(self.free):
            return
        with self.pool.lease(count) as lease:
            pages = list(lease.pages)
            assert all(self.pool.ref_count(page) == 1 for page in pages)
            if keep:
                lease.keep()
        assert pages == self.free[:count]
        self.free = ([] if keep else pages[::-1]) + self.free[count:]
        self.taken += pages if keep else []

    @invariant()
    def agrees_with_the_model(self):
        self.pool.check_integrity()
        assert self.pool.num_free == len(self.free)
        for page in range(NUM_PAGES):
            assert self.pool.ref_count(page) == self.taken.count(page)


EMPTY = st.just([])
TestPoolAgainstLists = PoolAgainstLists.TestCase
TestPoolAgainstLists.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
