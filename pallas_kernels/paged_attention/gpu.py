"""Paged attention on NVIDIA GPUs from Hopper on (Mosaic GPU), over split pages in bfloat16.

Two kernels behind one operation. *Decode* takes sequences whose rows fit one warpgroup and cuts
their keys into splits, which are merged through the log-sum-exp. *Prefill* cuts the rest into tiles
of query rows; where there are too few tiles to fill a GPU, as over a prefix that a batch shares,
their keys are split as well. Both copy pages with TMA into a ring of buffers, ahead of the
warpgroups that multiply (the scheme of FlashAttention-3, arXiv 2407.08608 section 3.1, with pages
as the copied boxes).

A row's bits depend on which of the three it went through, which the shapes of a call decide, and on
nothing else in its batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kvjax.pallas_kernels import hopper
from kvjax.pallas_kernels.page_ops import LayerPages
from kvjax.pallas_kernels.paged_attention import gpu_rows
from kvjax.pallas_kernels.paged_attention.gpu_blocks import Walk
from kvjax.pallas_kernels.paged_attention.gpu_decode import attend_splits
from kvjax.pallas_kernels.paged_attention.gpu_prefill import attend_tiles
from kvjax.pallas_kernels.tuning import block_sizes

_FILL = 264  # thread blocks that fill a GPU: two for each processor of an H100
_WORDS = 8  # of a tail mask: it is walked word by word in registers


def paged_attention(
    q, pages: LayerPages, block_tables, query_starts, kv_lens, visible_lo, visible_hi, *,
    scale, tail_mask=None, soft_cap=None, sinks=None, value_width=None, max_query_len=None,
    return_lse=False, interpret=None,
):  # fmt: skip
    """See `kvjax.pallas_kernels.paged_attention`. `interpret`: run in Mosaic GPU's interpreter."""
    group = q.shape[1] // pages.kv_heads
    _refuse(q, pages, tail_mask, group)
    hopper.require(interpret)
    block_tables, query_starts, kv_lens, lo, hi = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.int32),
        (block_tables, query_starts, kv_lens, visible_lo, visible_hi),
    )
    total = q.shape[0]
    owner = gpu_rows.owners(query_starts, total)
    hi = jnp.minimum(hi, kv_lens[owner])
    words = jnp.zeros((total, 0), jnp.uint32) if tail_mask is None else jnp.asarray(tail_mask)
    tokens = gpu_rows.Tokens(
        jnp.asarray(q).astype(jnp.bfloat16).reshape(total, -1, group, q.shape[2]),
        lo, hi, jax.lax.bitcast_convert_type(words, jnp.int32), query_starts, kv_lens,
    )  # fmt: skip
    call = _Call(tokens, pages, block_tables, owner, scale, soft_cap, interpret)
    if max_query_len is not None and max_query_len * group <= hopper.ROWS:
        o, lse = call.decode(jnp.ones(kv_lens.shape, bool), max_query_len)
    elif group > hopper.ROWS // 2:  # nothing to gain: a tile holds a token either way
        o, lse = call.prefill(jnp.ones(kv_lens.shape, bool))
    else:
        single = jnp.diff(query_starts) == 1
        few, many = call.decode(single, 1), call.prefill(~single)
        o, lse = jax.tree.map(
            lambda a, b: jnp.where(jnp.expand_dims(single[owner], range(1, a.ndim)), a, b),
            few, many,
        )  # fmt: skip
    real = jnp.arange(total, dtype=jnp.int32) < query_starts[-1]
    o, lse = _hide_unwritten(o, lse, real & (lo < hi))
    o, lse = _with_sinks(o, lse, sinks, real)
    o, lse = o.reshape(total, q.shape[1], -1), lse.reshape(total, q.shape[1])
    return (o, lse) if return_lse else o


def _refuse(q: Any, pages: Any, tail_mask: Any, group: int) -> None:
    """Raises NotImplementedError for what the kernels cannot do."""
    if not isinstance(pages, LayerPages):
        raise NotImplementedError(f"gpu: pages are {type(pages).__name__}, not in split layout")
    if pages.v is None:
        raise NotImplementedError("gpu: a latent output exceeds one warpgroup's registers")
    dtype = np.dtype(pages.k.dtype)
    if dtype == np.float32:
        raise NotImplementedError("gpu: tensor cores round float32 to tf32; xla keeps float32")
    if dtype not in (np.dtype(np.uint16), np.dtype(jnp.bfloat16)):
        raise NotImplementedError(f"gpu: pages are {dtype}, not bfloat16")
    for name, width in (("head_dim", q.shape[2]), ("value width", pages.v.shape[3])):
        if not 64 <= width <= 256 or width % 16:
            raise NotImplementedError(f"gpu: {name}={width} is no multiple of 16 in 64..256")
    if pages.page_size not in (8, 16, 32, 64, 128, 256):
        raise NotImplementedError(f"gpu: page_size={pages.page_size} is not 8, 16, ... or 256")
    if group > hopper.ROWS:
        raise NotImplementedError(f"gpu: {group} query heads on one KV head exceed {hopper.ROWS}")
    if tail_mask is not None and tail_mask.shape[1] > _WORDS:
        raise NotImplementedError(f"gpu: tail masks of {tail_mask.shape[1]} words exceed {_WORDS}")


class _Call:
    """One call's arguments and the two kernels over them."""

    def __init__(self, tokens, pages, tables, owner, scale, soft_cap, interpret) -> None:
        self.tokens, self.tables, self.owner = tokens, tables, owner
        self.k, self.v = _numbers(pages.k), _numbers(pages.v)
        self.group, self.width = tokens.q.shape[2:]
        self.place = jnp.arange(tokens.q.shape[0], dtype=jnp.int32) - tokens.starts[owner]
        self.scale, self.soft_cap, self.interpret = scale, soft_cap, interpret
        self.page_size = pages.page_size

    def _walk(self, name: str, consumers: int) -> tuple[Walk, dict[str, int]]:
        v_width = self.v.shape[3]
        sizes = block_sizes(
            f"paged_attention/{name}", head_dim=max(self.width, v_width), page_size=self.page_size
        )
        walk = Walk(
            page_size=self.page_size, width=self.width, v_width=v_width, block=sizes["block"],
            stages=sizes["stages"], consumers=consumers, scale=self.scale, soft_cap=self.soft_cap,
            tail_words=self.tokens.tail.shape[1], dtype=jnp.bfloat16, interpret=self.interpret,
        )  # fmt: skip
        return walk, sizes

    def decode(self, wanted: Array, max_query_len: int) -> tuple[Array, Array]:
        """Rows of the `wanted` sequences, none longer than `max_query_len`."""
        walk, sizes = self._walk("gpu_decode", 1)
        tiles = gpu_rows.one_per_sequence(self.tokens, wanted)
        rows = gpu_rows.rows(self.tokens, tiles, 1, max_query_len)
        arrays: Any = (*rows, self.tables, self.k, self.v)
        num_rows = max_query_len * self.group
        o, lse = attend_splits(walk, *arrays, split=sizes["split"], num_rows=num_rows)
        o, lse = _merge(o, lse[..., :num_rows])
        return gpu_rows.collect(o, lse, self.owner, self.place, self.group, max_query_len)

    def prefill(self, wanted: Array) -> tuple[Array, Array]:
        """Rows of the `wanted` sequences."""
        walk, sizes = self._walk("gpu_prefill", 2)
        per_group = hopper.ROWS // self.group
        size = walk.consumers * per_group
        tiles, first = gpu_rows.cut(self.tokens, wanted, size)
        rows = gpu_rows.rows(self.tokens, tiles, walk.consumers, per_group)
        arrays: Any = (*rows, self.tables, self.k, self.v)
        splits = _FILL // (tiles.seq.shape[0] * self.k.shape[1])  # partial results cost memory
        if splits > 1:
            even = -(-self.tables.shape[1] * self.page_size // splits)
            split = max(sizes["split"], -(-even // walk.block) * walk.block)
            o, lse = attend_splits(walk, *arrays, split=split, num_rows=hopper.ROWS)
            o, lse = _merge(o, lse)
        else:
            o, lse = attend_tiles(walk, *arrays)
        tile = first[self.owner] + self.place // size
        return gpu_rows.collect(o, lse, tile, self.place, self.group, per_group)


def _numbers(pool: Any) -> Array:
    pool = jnp.asarray(pool)
    if pool.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(pool, jnp.bfloat16)
    return pool


def _merge(o: Array, lse: Array) -> tuple[Array, Array]:
    """Merges the splits on axis 2. What an empty split has not written is never used."""
    top = jnp.max(lse, axis=2, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp(lse - top)
    total = jnp.sum(weights, axis=2)
    parts = jnp.where(weights[..., None] > 0, o, 0.0) * weights[..., None]
    o = jnp.sum(parts, axis=2) / jnp.where(total > 0, total, 1.0)[..., None]
    return o, jnp.where(total > 0, jnp.log(total), -jnp.inf) + top[:, :, 0]


def _hide_unwritten(o: Array, lse: Array, seeing: Array) -> tuple[Array, Array]:
    lse = jnp.where(seeing[:, None, None], lse, -jnp.inf)
    return jnp.where((lse > -jnp.inf)[..., None], o, 0.0), lse


def _with_sinks(o: Array, lse: Array, sinks: Any, real: Array) -> tuple[Array, Array]:
    """A sink only adds to the normaliser: `exp(lse)` becomes `exp(lse) + exp(sink)`."""
    if sinks is None:
        return o, lse
    sinks = jnp.asarray(sinks, jnp.float32).reshape(1, *lse.shape[1:])
    total = jnp.where(real[:, None, None], jnp.logaddexp(lse, sinks), lse)
    share = jnp.where(lse > -jnp.inf, jnp.exp(lse - total), 0.0)
    return o * share[..., None], total
