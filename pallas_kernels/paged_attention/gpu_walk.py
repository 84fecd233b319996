"""What a Mosaic GPU attention kernel is made for: widths, block sizes, shared memory, barriers."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kvjax.pallas_kernels.compat import mosaic_gpu as plgpu
from kvjax.pallas_kernels.hopper import ROWS, Warpgroup, tiled
from kvjax.pallas_kernels.tuning import rule

# Columns of `bounds`, one row per tile: which sequence, and what its query rows see.
SEQ, KV_LEN, FIRST, LAST, DENSE_LO, DENSE_HI = range(6)

_SHARED = 227 * 1024  # bytes of shared memory that a thread block of an H100 may have
_ALIGNED = 1024  # where a buffer may begin
_REDUCTIONS = 2048  # what the compiler keeps for its own reductions
WIDE = 320  # channels of a key: with more, rows and keys leave shared memory for little else


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """Static facts of one kernel.

    `consumers` times 64 query rows share each block, and `parts` warpgroups the channels of the
    values; one of the two is 1. `share` query tiles read the same KV head.
    """

    page_size: int
    width: int
    v_width: int
    block: int
    stages: int
    consumers: int
    scale: float
    soft_cap: float | None
    tail_words: int
    stored: Any  # dtype of the pages
    ahead: int  # blocks of scaled pages that are copied ahead
    latent: bool  # values are the leading channels of the keys
    parts: int
    share: int
    interpret: Any
    dtype: Any = jnp.bfloat16  # of what is multiplied

    @property
    def scaled(self) -> bool:
        """Whether pages hold `stored * scale`."""
        return self.stored != self.dtype

    @property
    def warpgroups(self) -> int:
        """Warpgroups that multiply."""
        return self.consumers * self.parts

    @property
    def v_columns(self) -> int:
        """Channels of the values that one warpgroup takes."""
        return self.v_width // self.parts

    @staticmethod
    def columns(width: int) -> int:
        """Columns of shared memory that the tiles of every dtype divide."""
        return math.gcd(width, 128)

    @property
    def group(self) -> Warpgroup:
        """The arithmetic of one warpgroup."""
        return Warpgroup(self.interpret)

    @property
    def copies(self) -> int:
        """Copies that fill one block of keys (or of values)."""
        return max(1, self.block // self.page_size)

    def scratch(self) -> dict[str, Any]:
        """Shared memory and barriers."""
        rows = (self.consumers, ROWS)
        groups = self.warpgroups
        shared = {
            "q_smem": tiled((*rows, self.width), self.dtype),
            # of each row: the interval, then the tail mask
            "seen_smem": plgpu.SMEM((self.consumers, 2 + self.tail_words, ROWS), jnp.int32),
            "o_smem": plgpu.SMEM((groups, ROWS, self.o_columns), jnp.float32),
            "lse_smem": plgpu.SMEM((groups, ROWS), jnp.float32),
            "rows_ready": plgpu.Barrier(num_arrivals=self.consumers * (3 + self.tail_words)),
            "v_clean": plgpu.Barrier(num_arrivals=groups),
        }
        for name, width in (("k", self.width), ("v", 0 if self.latent else self.v_width)):
            if width:
                shared |= {f"{name}_{what}": ref for what, ref in self._ring(width).items()}
        return shared

    def _ring(self, width: int) -> dict[str, Any]:
        """Shared memory and barriers of one stream (`gpu_loads`)."""
        filled = 1 if self.scaled else self.copies
        ring = {
            "smem": tiled((self.stages, self.block, width), self.dtype),
            "ready": plgpu.Barrier(num_arrivals=filled, num_barriers=self.stages),
            "free": plgpu.Barrier(num_arrivals=self.warpgroups, num_barriers=self.stages),
        }
        if not self.scaled:
            return ring
        return ring | {
            "stored": tiled((self.ahead, self.block, width), self.stored),
            "scales": plgpu.SMEM((self.ahead, self.block), jnp.float32),
            "landed": plgpu.Barrier(num_arrivals=2 * self.copies, num_barriers=self.ahead),
        }

    def channels(self, part: Any) -> Any:
        """The columns of the values that are a warpgroup's `part`."""
        if self.parts == 1:
            return pl.ds(0, self.v_columns)
        return pl.ds(pl.multiple_of(part * self.v_columns, self.v_columns), self.v_columns)

    def mine(self, w: Any) -> tuple[Any, Any]:
        """The query rows and the channels (in parts) of warpgroup `w`."""
        return (w, 0) if self.parts == 1 else (0, w)

    @property
    def o_columns(self) -> int:
        """Columns of output that pass through shared memory at once."""
        most = 64 if self.v_width <= 128 else 32
        return 8 if self.width > WIDE else math.gcd(self.v_width, most)


def shared_bytes(scratch: dict[str, Any]) -> int:
    """Shared memory of a kernel's buffers and barriers, as the compiler lays them out."""
    total = _REDUCTIONS
    for ref in scratch.values():
        if isinstance(ref, plgpu.Barrier):
            total += 8 * int(np.prod(ref.num_barriers))  # a tuple from jax 0.12 on
        else:
            size = math.prod(ref.shape) * jnp.dtype(ref.dtype).itemsize
            total += -(-size // _ALIGNED) * _ALIGNED
    return total


def require_fit(walk: Walk, scratch: dict[str, Any]) -> None:
    """Raises NotImplementedError if a kernel's `scratch` exceeds shared memory."""
    needed = shared_bytes(scratch)
    if needed > _SHARED:
        raise NotImplementedError(
            f"gpu: block={walk.block}, stages={walk.stages}, ahead={walk.ahead} of keys of "
            f"{walk.width} channels need {needed} bytes of shared memory, of {_SHARED}"
        )


# Decode leaves room for a second thread block on the same processor,
# whose copies run while this one computes, wherever the width allows.
@rule("paged_attention/gpu_decode")
def _decode_sizes(*, head_dim: int, page_size: int, bits: int) -> dict[str, int]:
    del page_size
    return {
        "block": 64, "stages": 2 if bits == 16 else 1, "ahead": 2, "split": _split(head_dim, bits),
    }  # fmt: skip


@rule("paged_attention/gpu_prefill")
def _prefill_sizes(*, head_dim: int, page_size: int, bits: int) -> dict[str, int]:
    del page_size
    block = 128 if head_dim <= 128 and bits == 16 else 64
    return {
        "block": block, "stages": 2 if bits == 16 else 1, "ahead": 2,
        "split": _split(head_dim, bits),
    }  # fmt: skip


def _split(head_dim: int, bits: int) -> int:
    """Keys of a split: so many that its partial result is little beside them."""
    return 2048 * 16 // bits if head_dim > WIDE else 1024
