"""Reference-counted page ids. Host-side and JAX-free: the pool moves integers, never KV."""

from collections.abc import Iterable

from kvjax.errors import OutOfPages


class PagePool:
    """Reference counts of `num_pages` pages, each of `page_size` KV slots.

    The page freed last is reused first: its memory is committed and warm, while pages that were
    never used cost a lazily committed pool nothing.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 0 or page_size < 1:
            raise ValueError(
                f"expected num_pages >= 0 and page_size >= 1: {num_pages=} {page_size=}"
            )
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, -1, -1))  # the next at the end
        self._refs = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can hand out now."""
        return len(self._free)

    def ref_count(self, page: int) -> int:
        """Users of `page`; 0 means free."""
        return self._refs[page]

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free pages, each with one reference, owned by the caller.

        All or nothing: raises `OutOfPages` and takes none when fewer are free.
        """
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}")
        if count > len(self._free):
            raise OutOfPages(wanted=count, free=len(self._free))
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._refs[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """Adds one reference to each page; only pages in use can be retained."""
        refs = self._refs
        for page in pages:
            assert refs[page] > 0, f"page {page} retained while free"
            refs[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Gives one reference of each page back; a page without any is free."""
        refs = self._refs
        for page in pages:
            assert refs[page] > 0, f"page {page} released twice"
            refs[page] -= 1
            if refs[page] == 0:
                self._free.append(page)

    def lease(self, count: int) -> "PageLease":
        """`with pool.lease(n) as lease:` takes `n` pages that go back unless `keep()` is called."""
        return PageLease(self, count)

    def check_integrity(self) -> None:
        """Asserts that every page is either free, once, or in use. Reads only; O(num_pages)."""
        free = set(self._free)
        assert len(free) == len(self._free), f"pages queued twice: {list(self._free)}"
        for page, refs in enumerate(self._refs):
            assert refs == 0 if page in free else refs > 0, f"{page=} {refs=}"


class PageLease:
    """Pages that return to the pool when the `with` block ends, unless kept.

    Entering allocates (and may raise `OutOfPages`). A lease is used once.
    """

    def __init__(self, pool: PagePool, count: int) -> None:
        self._pool, self._count = pool, count
        self._kept = False
        self.pages: list[int] = []

    def keep(self) -> list[int]:
        """Hands the pages and their references to the caller; they no longer go back."""
        self._kept = True
        return self.pages

    def __enter__(self) -> "PageLease":
        assert not self.pages, "a lease is entered once"
        self.pages = self._pool.allocate(self._count)
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._kept:
            self._pool.release(self.pages)
            self.pages = []
