"""Paged attention on NVIDIA GPUs from Hopper on (Mosaic GPU), over split pages.

Two kernels behind one operation. *Decode* takes sequences whose rows fit one warpgroup and cuts
their keys into splits, which are merged through the log-sum-exp. *Prefill* cuts the rest into tiles
of query rows; where there are too few tiles to fill a GPU, as over a prefix that a batch shares,
their keys are split as well. Both copy pages with TMA into a ring of buffers, ahead of the
warpgroups that multiply (the scheme of FlashAttention-3, arXiv 2407.08608 section 3.1, with pages
as the copied boxes). int8 and float8 pages become bfloat16 on the way; latent pages (MLA) are one
stream of keys, whose leading channels are the values.

A row's bits depend on which of the three it went through, which the shapes of a call decide, and on
nothing else in its batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.pallas_kernels import hopper
from kvjax.pallas_kernels.page_ops import LayerPages
from kvjax.pallas_kernels.page_ops.quantise import from_bits
from kvjax.pallas_kernels.paged_attention import gpu_rows
from kvjax.pallas_kernels.paged_attention.gpu_decode import attend_splits
from kvjax.pallas_kernels.paged_attention.gpu_prefill import attend_tiles
from kvjax.pallas_kernels.paged_attention.gpu_walk import WIDE, Walk, require_fit
from kvjax.pallas_kernels.tuning import block_sizes

_FILL = 264  # thread blocks that fill a GPU: two for each processor of an H100
_WIDEST = 256  # channels of an output that one warpgroup's registers hold
_WORDS = 8  # of a tail mask: it is walked word by word in registers
_WIDE_WORDS = 6  # what shared memory has left for it beside latents of 576 channels


def paged_attention(
    q, pages: LayerPages, block_tables, query_starts, kv_lens, visible_lo, visible_hi, *,
    scale, tail_mask=None, soft_cap=None, sinks=None, value_width=None, max_query_len=None,
    return_lse=False, interpret=None,
):  # fmt: skip
    """See `kvjax.pallas_kernels.paged_attention`. `interpret`: run in Mosaic GPU's interpreter."""
    refuse(q, pages, tail_mask, value_width)
    hopper.require(interpret)
    block_tables, query_starts, kv_lens, lo, hi = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.int32),
        (block_tables, query_starts, kv_lens, visible_lo, visible_hi),
    )
    total = q.shape[0]
    tokens, owner = gpu_rows.tokens_of(q, pages.kv_heads, tail_mask, query_starts, kv_lens, lo, hi)
    lo, hi, group = tokens.lo, tokens.hi, tokens.q.shape[2]
    call = _Call(tokens, pages, value_width, block_tables, owner, scale, soft_cap, interpret)
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


def refuse(q: Any, pages: Any, tail_mask: Any, value_width: int | None) -> None:
    """Raises NotImplementedError for what the kernels cannot do."""
    if not isinstance(pages, LayerPages):
        raise NotImplementedError(f"gpu: pages are {type(pages).__name__}, not in split layout")
    if pages.dtype == jnp.float32:
        raise NotImplementedError("gpu: tensor cores round float32 to tf32; xla keeps float32")
    if pages.dtype != jnp.bfloat16 and not pages.quantised:
        raise NotImplementedError(f"gpu: pages are {pages.dtype}, not bfloat16, int8 or float8")
    if pages.quantised and pages.k_scale is None:
        raise NotImplementedError(f"gpu: {pages.dtype} pages without scales")
    _refuse_widths(q.shape[2], pages, value_width)
    if pages.page_size not in (8, 16, 32, 64, 128, 256):
        raise NotImplementedError(f"gpu: page_size={pages.page_size} is not 8, 16, ... or 256")
    if pages.quantised and pages.page_size < 32:
        raise NotImplementedError(
            f"gpu: page_size={pages.page_size}: scales of less than 32 slots are no TMA box"
        )
    words = 0 if tail_mask is None else tail_mask.shape[1]
    most = _WORDS if q.shape[2] <= WIDE else _WIDE_WORDS
    if words > most:
        raise NotImplementedError(f"gpu: tail masks of {words} words exceed {most}")


def _refuse_widths(width: int, pages: LayerPages, value_width: int | None) -> None:
    if pages.v is not None:
        for name, x in (("head_dim", width), ("value width", pages.v.shape[3])):
            if not 64 <= x <= 256 or x % 16:
                raise NotImplementedError(f"gpu: {name}={x} is no multiple of 16 in 64..256")
        return
    if width % 64 or width > 576:
        raise NotImplementedError(f"gpu: latent keys of {width} are no multiple of 64 up to 576")
    if value_width is None or value_width % 64 or value_width > 512:
        raise NotImplementedError(f"gpu: {value_width=} is no multiple of 64 up to 512")
    if value_width > _WIDEST and value_width % 128:
        raise NotImplementedError(f"gpu: {value_width=} has no halves of whole 64 channels")


class _Call:
    """One call's arguments and the two kernels over them."""

    def __init__(
        self, tokens, pages, value_width, tables, owner, scale, soft_cap, interpret
    ) -> None:
        self.tokens, self.tables, self.owner = tokens, tables, owner
        self.latent = pages.v is None
        numbers = (from_bits(jnp.asarray(x)) for x in pages[:2] if x is not None)
        scales = (jnp.asarray(x) for x in pages[2:] if x is not None)
        self.pools = (*numbers, *scales)
        self.v_width = value_width if self.latent else pages.v.shape[3]
        self.share = tokens.q.shape[1] // pages.kv_heads
        self.group, self.width = tokens.q.shape[2:]
        self.place = jnp.arange(tokens.q.shape[0], dtype=jnp.int32) - tokens.starts[owner]
        self.scale, self.soft_cap, self.interpret = scale, soft_cap, interpret
        self.page_size = pages.page_size

    def _walk(self, name: str, consumers: int) -> tuple[Walk, dict[str, int]]:
        stored = self.pools[0].dtype
        sizes = block_sizes(
            f"paged_attention/{name}", head_dim=max(self.width, self.v_width),
            page_size=self.page_size, bits=8 * stored.itemsize,
        )  # fmt: skip
        parts = 2 if self.v_width > _WIDEST else 1
        consumers = 1 if parts > 1 or self.width > WIDE else consumers
        walk = Walk(
            page_size=self.page_size, width=self.width, v_width=self.v_width, block=sizes["block"],
            stages=sizes["stages"], consumers=consumers, scale=self.scale,
            soft_cap=self.soft_cap, tail_words=self.tokens.tail.shape[1], stored=stored,
            ahead=sizes["ahead"], latent=self.latent, parts=parts, share=self.share,
            interpret=self.interpret,
        )  # fmt: skip
        require_fit(walk, walk.scratch())
        return walk, sizes

    def decode(self, wanted: Array, max_query_len: int) -> tuple[Array, Array]:
        """Rows of the `wanted` sequences, none longer than `max_query_len`."""
        walk, sizes = self._walk("gpu_decode", 1)
        tiles = gpu_rows.one_per_sequence(self.tokens, wanted)
        rows = gpu_rows.rows(self.tokens, tiles, 1, max_query_len)
        arrays: Any = (*rows, self.tables, *self.pools)
        num_rows = max_query_len * self.group
        o, lse = attend_splits(walk, *arrays, split=sizes["split"], num_rows=num_rows)
        o, lse = _merge(o, lse[..., :num_rows])
        at = (self.owner, self.place, self.group, max_query_len)
        return gpu_rows.collect(o, *at), gpu_rows.collect(lse, *at)

    def prefill(self, wanted: Array) -> tuple[Array, Array]:
        """Rows of the `wanted` sequences."""
        walk, sizes = self._walk("gpu_prefill", 2)
        per_group = hopper.ROWS // self.group
        size = walk.consumers * per_group
        tiles, first = gpu_rows.cut(self.tokens, wanted, size)
        rows = gpu_rows.rows(self.tokens, tiles, walk.consumers, per_group)
        arrays: Any = (*rows, self.tables, *self.pools)
        splits = _FILL // (
            tiles.seq.shape[0] * self.tokens.q.shape[1]
        )  # partial results cost memory
        if splits > 1:
            even = -(-self.tables.shape[1] * self.page_size // splits)
            split = max(sizes["split"], -(-even // walk.block) * walk.block)
            o, lse = attend_splits(walk, *arrays, split=split, num_rows=hopper.ROWS)
            o, lse = _merge(o, lse)
        else:
            o, lse = attend_tiles(walk, *arrays)
        at = (first[self.owner] + self.place // size, self.place, self.group, per_group)
        return gpu_rows.collect(o, *at), gpu_rows.collect(lse, *at)


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
