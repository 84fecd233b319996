"""Which chunks have their KV stored, in which variants, and who leaves when room is short.

A chunk is known by its tokens, its tenant and its model; a *variant* of it by the context its KV
was computed behind. The canonical variant has none: it was computed by itself from position 0, and
its pages are ordinary prefix pages. Stored KV is never modified: whoever uses it copies it.

Host bookkeeping over page ids; what fills and reads the pages is `kvjax.chunks`.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvjax.cache.pool import PagePool
from kvjax.errors import UnknownChunk

PROTECTED_SHARE = 0.8  # of the capacity, that chunks used more than once may hold on to


def tokens_hash(tokens: Iterable[int]) -> str:
    """128 bits that stand for a sequence of token ids, as hexadecimal digits."""
    return hashlib.blake2b(np.asarray(list(tokens), np.int64).tobytes(), digest_size=16).hexdigest()


class VariantKey(NamedTuple):
    """One stored KV: whose, of which tokens, behind which context (`tokens_hash`; "" is none)."""

    salt: str | None
    chunk: str
    context: str


@dataclasses.dataclass(slots=True, eq=False)
class Variant:
    """The KV of a chunk's tokens, computed behind one context. Its pages may hold other tokens
    too: token `i` is at offset `first + i` of `page_ids`. Without pages it is on the host alone, in
    `arrays`, as what gives its KV back."""

    key: VariantKey
    tokens: np.ndarray  # i64[n]
    base: int  # rotary position of the first token
    page_ids: list[int]
    first: int  # slot of the first token within the first page
    lineage: str = "exact"  # or what its own context was made by
    context_ids: tuple[int, ...] = ()  # the tokens in front of it, where they are known
    context_chunks: tuple[str, ...] = ()  # of which chunks these consist, if of chunks
    tail: tuple[int, ...] = ()  # what ends the chunk and has no KV: decoding needs none of its last
    scores: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # f32[n] each
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # what a strategy keeps of it
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # hidden states, ...
    pins: int = 0
    holds: int = 0  # sequences that are not over and whose plan has it
    uses: int = 0
    last_use: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV it holds."""
        return len(self.tokens)

    def slots(self, start: int, stop: int, page_size: int) -> np.ndarray:
        """Slots of tokens `[start, stop)` of the chunk, i32."""
        at = self.first + np.arange(start, stop)
        return np.asarray(self.page_ids, np.int32)[at // page_size] * page_size + at % page_size


class VariantView(NamedTuple):
    """What an order of eviction may know about a variant."""

    last_use: int  # logical clock
    uses: int
    num_tokens: int
    saving: float  # share of the chunk's tokens that a use of it did not compute, on average


# Order in which variants leave: a pure sort key, the smallest goes first.
ChunkEvictionPolicy = Callable[[VariantView], tuple[float, ...]]


def _lru(variant: VariantView) -> tuple[float, ...]:
    return (variant.last_use,)


def _lfu(variant: VariantView) -> tuple[float, ...]:
    return (variant.uses, variant.last_use)


def _saving(variant: VariantView) -> tuple[float, ...]:
    """Uses times what each saves (Cache-Craft, arXiv 2502.15734, section on retention)."""
    return (variant.uses * variant.saving, variant.last_use)


# By the name that `EngineConfig.chunk_eviction_policy` gives; one from outside is one more entry.
CHUNK_EVICTION_POLICIES: dict[str, ChunkEvictionPolicy] = {
    "lru": _lru,
    "lfu": _lfu,
    "saving": _saving,
}


@dataclasses.dataclass(frozen=True, slots=True)
class ChunkStats:
    """What the store holds, and counts since it was made."""

    chunks: int
    variants: int
    tokens: int
    pages: int
    capacity_pages: int
    pinned: int
    lookups: int
    hits: int
    admitted: int
    refused: int
    evicted: int


class ChunkStore:
    """Variants by key over the pages of `pool`, of which it holds references of its own.

    Admission is bounded: a newcomer takes free capacity, or the place of variants that were not
    used since they came; those that were used keep up to `PROTECTED_SHARE` of the capacity against
    any number of newcomers. Pinned ones never leave. Those that a sequence holds leave last: if it
    is preempted, it finds what it began with, as long as anything else can go.
    """

    def __init__(
        self, pool: PagePool, capacity_pages: int, policy: ChunkEvictionPolicy | None = None
    ) -> None:
        if capacity_pages < 0:
            raise ValueError(f"capacity_pages must not be negative, got {capacity_pages}")
        self._pool, self.capacity_pages = pool, capacity_pages
        self._policy = policy or CHUNK_EVICTION_POLICIES["lru"]
        self._variants: dict[VariantKey, Variant] = {}
        self._by_chunk: dict[tuple[str | None, str], dict[str, Variant]] = {}
        self._held: dict[object, tuple[Variant, ...]] = {}  # by sequence
        self._clock = 0
        self._lookups = self._hits = self._admitted = self._refused = self._evicted = 0

    def __len__(self) -> int:
        return len(self._variants)

    def __iter__(self) -> Iterator[Variant]:
        return iter(list(self._variants.values()))

    def size(self, variant: Variant) -> int:
        """Pages that it counts for: its own, or on the host as many as its KV would take."""
        return len(variant.page_ids) or -(-variant.num_tokens // self._pool.page_size)

    @property
    def num_pages(self) -> int:
        """Pages that variants refer to; one that two share counts twice."""
        return sum(len(v.page_ids) for v in self._variants.values())

    @property
    def stats(self) -> ChunkStats:
        """Counts so far."""
        return ChunkStats(
            chunks=len(self._by_chunk),
            variants=len(self._variants),
            tokens=sum(v.num_tokens for v in self._variants.values()),
            pages=self.num_pages,
            capacity_pages=self.capacity_pages,
            pinned=sum(v.pins > 0 for v in self._variants.values()),
            lookups=self._lookups,
            hits=self._hits,
            admitted=self._admitted,
            refused=self._refused,
            evicted=self._evicted,
        )

    # ---- finding ----------------------------------------------------------------------------

    def variants(self, salt: str | None, chunk: str) -> Mapping[str, Variant]:
        """All variants of a chunk by context hash. Counts as no use."""
        return self._by_chunk.get((salt, chunk), {})

    def of(self, salt: str | None) -> Iterator[Variant]:
        """All variants of a tenant, in the order in which they came. Counts as no use."""
        return (variant for variant in self if variant.key.salt == salt)

    def get(self, key: VariantKey) -> Variant | None:
        """One variant, if it is stored. Counts as no use."""
        return self._variants.get(key)

    def use(self, variant: Variant) -> None:
        """Records that a request reads `variant`."""
        self._clock += 1
        variant.uses += 1
        variant.last_use = self._clock

    def looked_up(self, hit: bool) -> None:
        """Records a lookup on behalf of a request."""
        self._lookups += 1
        self._hits += hit

    def hold(self, owner: object, variants: Iterable[Variant]) -> None:
        """Lets `variants`, and no others, leave last on behalf of `owner`, until `let_go`."""
        self.let_go(owner)
        self._held[owner] = tuple(variants)
        for variant in self._held[owner]:
            variant.holds += 1

    def let_go(self, owner: object) -> None:
        """Undoes `hold`; does nothing if there was none."""
        for variant in self._held.pop(owner, ()):
            variant.holds -= 1

    # ---- changing ---------------------------------------------------------------------------

    def admits(self, num_pages: int, *, on_host: bool = False) -> bool:
        """Whether a newcomer of that size would be let in now. Changes nothing."""
        return self._victims(num_pages, on_host) is not None

    def put(self, variant: Variant) -> bool:
        """Stores a variant and retains its pages, if there is room for it; whether there was.

        The caller keeps its own references. An older variant of the same key is replaced, unless
        it is pinned: then it stays, and the newcomer is refused.
        """
        old = self._variants.get(variant.key)
        if old is not None:
            if old.pins:
                return False
            self._drop(old)
        victims = self._victims(self.size(variant), not variant.page_ids)
        if victims is None:
            self._refused += 1
            return False
        for victim in victims:
            self._drop(victim)
            self._evicted += 1
        self._pool.retain(variant.page_ids)
        self._clock += 1
        variant.last_use = self._clock
        self._variants[variant.key] = variant
        salt, chunk, context = variant.key
        self._by_chunk.setdefault((salt, chunk), {})[context] = variant
        self._admitted += 1
        return True

    def discard(self, variant: Variant) -> None:
        """Drops a variant, pinned or not, if it is still there."""
        if self._variants.get(variant.key) is variant:
            self._drop(variant)

    def pin(self, salt: str | None, chunk: str, *, by: int = 1) -> int:
        """Keeps all variants of a chunk (`by=-1` undoes it); how many there are.

        Raises:
          UnknownChunk: none is stored.
        """
        found = self.variants(salt, chunk)
        if not found:
            raise UnknownChunk(f"no KV is stored for chunk {chunk}")
        for variant in found.values():
            variant.pins = max(0, variant.pins + by)
        return len(found)

    def evict(self, num_pages: int) -> int:
        """Drops unpinned variants in the order of the policy until they held that many pages.

        Pages that others still use, the prefix tree among them, are not free by that. Returns the
        number of pages given up.
        """
        given_up = 0
        on_device = [variant for variant in self._variants.values() if variant.page_ids]
        for variant in self._ordered(on_device) if num_pages > 0 else ():
            given_up += len(variant.page_ids)
            self._drop(variant)
            self._evicted += 1
            if given_up >= num_pages:
                break
        return given_up

    def clear(self) -> None:
        """Drops everything, pinned or not."""
        for variant in self:
            self._drop(variant)

    def lose_pages(self) -> None:
        """Drops what was on the device, pinned or not: the pages' content is lost."""
        for variant in self:
            if variant.page_ids:
                self._drop(variant)

    def check_integrity(self) -> None:
        """Asserts that indices agree and that every page is held. Reads only."""
        assert self._variants == {
            (salt, chunk, context): variant
            for (salt, chunk), found in self._by_chunk.items()
            for context, variant in found.items()
        }
        for key, variant in self._variants.items():
            assert key == variant.key
            assert variant.key.chunk == tokens_hash((*variant.tokens, *variant.tail))
            covered = len(variant.page_ids) * self._pool.page_size
            assert not covered or variant.first + variant.num_tokens <= covered
            for page in variant.page_ids:
                assert self._pool.ref_count(page) > 0, page

    # ---- choosing who leaves ----------------------------------------------------------------

    def _victims(self, num_pages: int, on_host: bool) -> Sequence[Variant] | None:
        """Who must go for a newcomer of that size; None if it is to be refused. Host and device are
        bounded alike, each by itself."""
        peers = [v for v in self._variants.values() if on_host == (not v.page_ids)]
        missing = num_pages - (self.capacity_pages - sum(map(self.size, peers)))
        if num_pages > self.capacity_pages:
            return None
        protected = sum(self.size(v) for v in peers if v.uses or v.pins)
        over = protected - int(PROTECTED_SHARE * self.capacity_pages)
        victims = []
        for variant in self._ordered(peers):
            if missing <= 0:
                break
            if variant.uses:  # in the order of the policy, and only what is above the share
                if over <= 0:
                    continue
                over -= self.size(variant)
            victims.append(variant)
            missing -= self.size(variant)
        return victims if missing <= 0 else None

    def _ordered(self, variants: Iterable[Variant]) -> list[Variant]:
        """Unpinned ones, who leaves first first: those never used before those that were, and
        those that a sequence holds after all others."""

        def order(variant: Variant) -> tuple[float, ...]:
            saving = float(variant.facts.get("saving", 1.0))
            view = VariantView(variant.last_use, variant.uses, variant.num_tokens, saving)
            return (float(variant.holds > 0), float(variant.uses > 0), *self._policy(view))

        return sorted((v for v in variants if not v.pins), key=order)

    def _drop(self, variant: Variant) -> None:
        del self._variants[variant.key]
        salt, chunk, context = variant.key
        found = self._by_chunk[salt, chunk]
        del found[context]
        if not found:
            del self._by_chunk[salt, chunk]
        self._pool.release(variant.page_ids)
