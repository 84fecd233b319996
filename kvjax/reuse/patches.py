"""Patches that were made ahead of time: how many bytes of them are kept, and which go first.

A patch lies with the stored KV that it corrects, in `Variant.facts`, where strategies find it. It
outlives that KV: a chunk that is evicted and encoded again, which gives the same KV, has its
patches back. Host memory only.
"""

import dataclasses
from typing import NamedTuple

from kvjax.cache.chunks import ChunkStore, Variant, VariantKey
from kvjax.reuse.strategy import KVPatch


class _Key(NamedTuple):
    variant: VariantKey
    name: str  # in `Variant.facts`


@dataclasses.dataclass(frozen=True, slots=True)
class PatchStats:
    """What is kept, and counts since the start."""

    patches: int
    num_bytes: int
    capacity_bytes: int
    evicted: int
    refused: int


class Patches:
    """At most `capacity_bytes` of patches for the chunks of `store`; the least recently used leave
    first, but none of a pinned chunk."""

    def __init__(self, store: ChunkStore, capacity_bytes: int) -> None:
        if capacity_bytes < 0:
            raise ValueError(f"capacity_bytes must not be negative, got {capacity_bytes}")
        self._store, self._capacity = store, capacity_bytes
        self._kept: dict[_Key, KVPatch] = {}  # least recently used first
        self._num_bytes = self._evicted = self._refused = 0

    @property
    def stats(self) -> PatchStats:
        """What is kept, and counts so far."""
        return PatchStats(
            len(self._kept), self._num_bytes, self._capacity, self._evicted, self._refused
        )

    def put(self, variant: Variant, name: str, patch: KVPatch) -> bool:
        """Keeps a patch of a stored variant, in place of one of the same name; whether there was
        room."""
        key = _Key(variant.key, name)
        missing = self._num_bytes + patch.num_bytes - self._capacity
        if key in self._kept:
            missing -= self._kept[key].num_bytes
        victims = self._victims(missing, key)
        if victims is None:
            self._refused += 1
            return False
        for victim in victims:
            self._drop(victim)
            self._evicted += 1
        self._drop(key)
        self._kept[key] = patch
        self._num_bytes += patch.num_bytes
        variant.facts[name] = patch
        return True

    def use(self, variant: Variant, patch: KVPatch) -> None:
        """Records that a prompt takes a patch."""
        for key, kept in self._kept.items():
            if kept is patch and key.variant == variant.key:
                self._kept[key] = self._kept.pop(key)
                return

    def attach(self, variant: Variant) -> None:
        """Gives a variant that was just stored the patches that are kept for it, and keeps those
        that it brings, as far as there is room."""
        brought = [(n, p) for n, p in variant.facts.items() if isinstance(p, KVPatch)]
        for name, patch in brought:
            if not self.put(variant, name, patch):
                del variant.facts[name]
        for key, patch in self._kept.items():
            if key.variant == variant.key:
                variant.facts[key.name] = patch

    def clear(self) -> None:
        """Drops all patches."""
        for key in list(self._kept):
            self._drop(key)

    def check_integrity(self) -> None:
        """Asserts that the count is right and within the capacity. Reads only."""
        assert self._num_bytes == sum(patch.num_bytes for patch in self._kept.values())
        assert self._num_bytes <= self._capacity
        for variant in self._store:
            for name, fact in variant.facts.items():
                if isinstance(fact, KVPatch):
                    assert self._kept[_Key(variant.key, name)] is fact

    def _victims(self, missing: int, newcomer: _Key) -> list[_Key] | None:
        victims = []
        for key, patch in self._kept.items():
            if missing <= 0:
                break
            holder = self._store.get(key.variant)
            if key != newcomer and (holder is None or not holder.pins):
                victims.append(key)
                missing -= patch.num_bytes
        return victims if missing <= 0 else None

    def _drop(self, key: _Key) -> None:
        patch = self._kept.pop(key, None)
        if patch is None:
            return
        self._num_bytes -= patch.num_bytes
        holder = self._store.get(key.variant)
        if holder is not None:
            holder.facts.pop(key.name, None)
