"""Paged attention as hand-written Mosaic TPU kernels that read packed pages where they lie.

`tpu_decode` takes the sequences that bring one token, `tpu_prefill` the others; both walk keys in
blocks of the same size, counted from the start of the sequence. What the kernels do on a TPU is
unproved: they are compiled for TPUs ahead of time and run in interpret mode.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from kvjax.pallas_kernels import compat
from kvjax.pallas_kernels.page_ops import PackedPages
from kvjax.pallas_kernels.paged_attention.tpu_decode import decode
from kvjax.pallas_kernels.paged_attention.tpu_items import decode_items
from kvjax.pallas_kernels.paged_attention.tpu_prefill import prefill
from kvjax.pallas_kernels.paged_attention.tpu_stream import Geometry
from kvjax.pallas_kernels.paged_attention.tpu_tiles import Tiling, power_of_two, prefill_sizes
from kvjax.pallas_kernels.tuning import block_sizes, rule

_READABLE = (  # uint16 and uint8 are the bits of bfloat16 and float8
    jnp.float32, jnp.bfloat16, jnp.uint16, jnp.int8, jnp.uint8, jnp.float8_e4m3fn,
)  # fmt: skip
_TABLE_BYTES = 512 * 1024  # of scalar memory (1 MiB) for block tables
_BLOCK_BYTES = 1024 * 1024  # of pages per buffer, of which there are two


def paged_attention(
    q, pages: PackedPages, block_tables, query_starts, kv_lens, visible_lo, visible_hi, *,
    scale, tail_mask=None, soft_cap=None, sinks=None, value_width=None, max_query_len=None,
    return_lse=False, interpret: Any = False,
):  # fmt: skip
    """See `kvjax.pallas_kernels.paged_attention`. `interpret` is that of `pl.pallas_call`."""
    refuse(pages, block_tables, interpret)
    q, block_tables, starts, kv_lens, lo, hi = jax.tree.map(
        jnp.asarray, (q, block_tables, query_starts, kv_lens, visible_lo, visible_hi)
    )
    tokens, q_heads, width = q.shape
    words = 0 if tail_mask is None else tail_mask.shape[1]
    g = geometry(
        pages, q_heads, value_width, words, soft_cap, return_lse, interpret, block_tables.shape[1]
    )
    if sinks is None:
        sinks = jnp.full(q_heads, -jnp.inf)
    sinks = jnp.asarray(sinks, jnp.float32).reshape(g.kv_heads, g.group, 1)
    q = queries(g, q, scale)
    tail = jnp.zeros((tokens, 0), jnp.int32)
    if tail_mask is not None:
        tail = jax.lax.bitcast_convert_type(jnp.asarray(tail_mask), jnp.int32)
    call = _Call(g, pages, block_tables, starts, kv_lens, lo, hi, tail, sinks)
    results = call.singles(q, call.tiles(q) if max_query_len != 1 else None)
    first = 0 if g.latent or g.v_first else g.lanes // 2  # values not cut out in the kernel
    out = results[0].reshape(tokens, q_heads, g.v_lanes)
    out = out[..., first : first + (value_width or width)]
    return (out, results[1].reshape(tokens, q_heads)) if return_lse else out


def refuse(pages, block_tables, interpret: Any = False) -> None:
    """Raises NotImplementedError with the reason why these pages cannot be read by Mosaic TPU."""
    if not isinstance(pages, PackedPages):
        raise NotImplementedError("tpu: pages are split; the kernels read packed pages")
    if not interpret:
        compat.probe_tpu()
    dtype, page_size = pages.kv.dtype, pages.kv.shape[2]
    if dtype not in _READABLE:
        raise NotImplementedError(f"tpu: pages are {dtype}, which the kernels cannot unpack")
    rows = 32 // dtype.itemsize
    if page_size % rows:
        raise NotImplementedError(
            f"tpu: page_size={page_size} of {dtype} is not a multiple of its {rows} rows per tile"
        )
    if 4 * block_tables.size > _TABLE_BYTES:
        raise NotImplementedError(
            f"tpu: block tables of {4 * block_tables.size} bytes exceed the {_TABLE_BYTES} that "
            "scalar memory holds"
        )


def geometry(
    pages: PackedPages, q_heads: int, value_width: int | None, words: int,
    soft_cap: float | None, with_lse: bool, interpret: Any, pages_per_seq: int,
) -> Geometry:  # fmt: skip
    """The static facts of a call: which lanes are what, and the keys per block."""
    _, kv_heads, page_size, lanes = pages.kv.shape
    half = lanes // 2
    apart = value_width is None and half % 128 == 0  # K and V can be cut at a lane tile
    v_lanes = half if apart else lanes
    if value_width is not None:
        v_lanes = -(-value_width // 128) * 128
    per_key = kv_heads * lanes * pages.kv.dtype.itemsize
    keys = block_sizes("paged_attention/tpu_keys", bytes_per_key=per_key)["keys"]
    keys = min(keys, pages_per_seq * page_size)
    return Geometry(
        kv_heads=kv_heads, group=q_heads // kv_heads, page_size=page_size,
        block=max(1, keys // page_size) * page_size, lanes=lanes,
        q_lanes=half if apart else lanes, v_first=half if apart else 0, v_lanes=v_lanes,
        tail_words=words, scaled=pages.scale is not None, latent=value_width is not None,
        soft_cap=soft_cap, with_lse=with_lse, interpret=interpret,
        q_dtype=jnp.dtype(jnp.float32 if pages.kv.dtype == jnp.float32 else jnp.bfloat16),
    )  # fmt: skip


def queries(g: Geometry, q: Array, scale: float) -> Array:
    """Scaled `[tokens, kv_heads, group, q_lanes]` in the dtype of the products."""
    q = (q.astype(jnp.float32) * scale).astype(g.q_dtype)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, g.q_lanes - q.shape[-1])))
    return q.reshape(q.shape[0], g.kv_heads, g.group, g.q_lanes)


@rule("paged_attention/tpu_keys")
def _keys(bytes_per_key: int) -> dict[str, int]:
    """Keys per block, the same in both bodies: a buffer of about a MiB."""
    return {"keys": min(512, max(128, power_of_two(_BLOCK_BYTES // bytes_per_key)))}


def prefill_tile(pages: PackedPages, q_heads: int, value_width: int | None, tokens: int) -> int:
    """Query tokens that share one walk over their keys, for whoever counts bytes."""
    g = geometry(pages, q_heads, value_width, 0, None, False, False, 1)
    return prefill_sizes(g, tokens)[0]


class _Call:
    """The arguments of one call."""

    def __init__(self, g: Geometry, pages, tables, starts, kv_lens, lo, hi, tail, sinks) -> None:
        self.g, self.pages, self.tables, self.starts = g, pages, tables, starts
        self.kv_lens, self.lo, self.hi, self.tail, self.sinks = kv_lens, lo, hi, tail, sinks
        self.single = jnp.diff(starts) == 1
        # one page of nothing where there are no scales
        scales = jnp.zeros((1, 8, 128), jnp.float32) if pages.scale is None else pages.scale
        self.pool, self.scales = (compat.in_hbm(x, g.interpret) for x in (pages.kv, scales))

    def cost(self, rows: int, walks: int) -> pl.CostEstimate:
        """Operations and bytes if each of `walks` items reads every page of its table row."""
        g, keys = self.g, self.tables.shape[1] * self.g.page_size
        slot = g.kv_heads * (g.lanes * self.pages.kv.dtype.itemsize + 8 * g.scaled)
        query = g.kv_heads * g.group * (g.q_lanes * g.q_dtype.itemsize + 4 * g.v_lanes)
        per_score = 2 * (g.q_lanes + g.v_lanes) * g.kv_heads * g.group
        return pl.CostEstimate(
            flops=rows * keys * per_score,
            bytes_accessed=walks * keys * slot + rows * query,
            transcendentals=rows * keys * g.kv_heads * g.group,
        )

    def singles(self, q: Array, rest: list[Array] | None) -> list[Array]:
        """Rows of the sequences that bring one token, put into `rest`."""
        g, tokens, seqs = self.g, q.shape[0], self.kv_lens.shape[0]
        items = decode_items(self.starts, self.kv_lens, self.lo, self.hi, g.tail_words, g.block)
        tail = jnp.zeros((seqs, 1, 1), jnp.int32)  # no block may be empty
        if g.tail_words:
            tail = self.tail[items.begin][:, None]
        results = decode(
            g, items, self.tables, q[items.begin], tail, self.sinks, self.pool, self.scales,
            self.cost(seqs, seqs),
        )  # fmt: skip
        if rest is None:
            rest = [jnp.zeros((tokens, *x.shape[1:])) for x in results]
        at = jnp.where(self.single, items.begin, tokens)
        return [old.at[at].set(x, mode="drop") for old, x in zip(rest, results, strict=True)]

    def tiles(self, q: Array) -> list[Array]:
        """Rows of the sequences that bring several tokens; the other rows are zeros."""
        g, tokens = self.g, q.shape[0]
        tiling = Tiling(g, self.starts, self.kv_lens, self.lo, self.hi, self.tail)
        tile, chunk = tiling.tile, tiling.chunk
        results = prefill(
            g, tiling.items, self.tables, tiling.chunks(q), tiling.rows,
            jnp.repeat(self.sinks, chunk, axis=1), self.pool, self.scales,
            self.cost(tokens, -(-tokens // tile)), tile=tile, chunk=chunk,
        )  # fmt: skip
        return [tiling.by_token(x) for x in results]
