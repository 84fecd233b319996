"""Bytes that the Mosaic GPU kernels copy, where every tile sees all keys of its sequence.

CUDA's compiler counts none. A kernel's own traffic is its copies by TMA, and `kernel_bytes` says
how many bytes they are; `tests/pallas_kernels/test_gpu_bytes.py` proves that it says so by counting
them in the interpreter, and `tests/aot/cuda.py` uses it for shapes that no interpreter runs.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax.numpy as jnp

from kvjax.pallas_kernels.attention_mass import gpu as mass
from kvjax.pallas_kernels.hopper import ROWS
from kvjax.pallas_kernels.paged_attention import gpu as attention
from kvjax.pallas_kernels.paged_attention.gpu_walk import Walk


@dataclasses.dataclass(frozen=True)
class Call:
    """One launch of an attention kernel."""

    walk: Walk
    tiles: int
    heads: int  # tiles' query heads, `walk.share` of which read the same KV head
    splits: int
    keys: int  # of a sequence
    num_rows: int  # of output, of 64
    segments: int | None = None  # of attention mass, padded

    @property
    def key_bytes(self) -> int:
        """Bytes of one key of one head with its value and scales, as the pages hold them."""
        streams = [self.walk.width]
        if not self.walk.latent:
            streams.append(self.walk.v_width)
        item = jnp.dtype(self.walk.stored).itemsize
        return sum(width * item + (4 if self.walk.scaled else 0) for width in streams)

    @property
    def keys_read(self) -> int:
        """Bytes of the keys, each read once by each tile: what the task needs."""
        return self.tiles * self.heads * self.keys * self.key_bytes

    def bytes(self, idle: int = 0) -> int:
        """Bytes of all copies, if `idle` of the tiles have no key at all."""
        walk, tiles = self.walk, self.tiles - idle
        blocks = -(-self.keys // walk.block)
        row = walk.consumers * ROWS * (2 * walk.width + 4 * (2 + walk.tail_words))
        lse = 4 * walk.consumers * ROWS
        total = tiles * self.heads * blocks * walk.block * self.key_bytes
        runs = tiles * self.heads * self.splits
        if self.segments is not None:
            total += tiles * self.heads * blocks * walk.block * 4
            return total + runs * (row + lse + 4 * ROWS * self.segments)
        total += runs * (row + lse + 4 * walk.warpgroups * self.num_rows * walk.v_columns)
        return total + idle * self.heads * self.splits * lse


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """Gives a list that gathers the launches traced in this context."""
    calls: list[Call] = []

    def keys_of(walk: Walk, tables: Any) -> int:
        return tables.shape[1] * walk.page_size

    def splits(walk: Walk, *arrays: Any, split: int, num_rows: int) -> Any:
        keys, (tiles, heads) = keys_of(walk, arrays[5]), arrays[0].shape[:2]
        calls.append(Call(walk, tiles, heads, -(-keys // split), keys, num_rows))
        return attend_splits(walk, *arrays, split=split, num_rows=num_rows)

    def whole(walk: Walk, *arrays: Any) -> Any:
        tiles, heads = arrays[0].shape[:2]
        calls.append(Call(walk, tiles, heads, 1, keys_of(walk, arrays[5]), ROWS))
        return attend_tiles(walk, *arrays)

    def sums(walk: Walk, *arrays: Any, split: int, num_keys: int, with_segments: bool) -> Any:
        tiles, heads = arrays[0].shape[:2]
        segments = walk.v_width if with_segments else 0
        calls.append(Call(walk, tiles, heads, -(-num_keys // split), num_keys, 0, segments))
        options: Any = {"split": split, "num_keys": num_keys, "with_segments": with_segments}
        return mass_of_tiles(walk, *arrays, **options)

    attend_splits, attend_tiles = attention.attend_splits, attention.attend_tiles
    mass_of_tiles = mass.mass_of_tiles
    with (
        mock.patch.object(attention, "attend_splits", splits),
        mock.patch.object(attention, "attend_tiles", whole),
        mock.patch.object(mass, "mass_of_tiles", sums),
    ):
        yield calls
