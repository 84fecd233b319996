"""The decode body on Mosaic TPU: one query token per sequence, all heads at once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kvjax.pallas_kernels import compat
from kvjax.pallas_kernels.paged_attention.blockwise import absorb, finish, tail_allows
from kvjax.pallas_kernels.paged_attention.softmax import NEVER, Softmax
from kvjax.pallas_kernels.paged_attention.tpu_items import Items
from kvjax.pallas_kernels.paged_attention.tpu_stream import (
    SEQUENTIAL,
    Geometry,
    PageStream,
    product,
)


def _body(*refs, geometry: Geometry) -> None:
    g, n = geometry, len(Items._fields)
    items, tables = Items(*refs[:n]), refs[n]
    (
        # inputs: [1, kv_heads, group, q_lanes], [1, 1, words], [kv_heads, group, 1], pool, scales
        q_ref, tail_ref, sinks_ref, pool, scales,
        # outputs: [1, kv_heads, group, v_lanes], if wanted [1, kv_heads, group, 1]; scratch
        o_ref, *lse_ref, kv, kv_scales, arrived,
    ) = refs[n + 1 :]  # fmt: skip
    buffers = kv, kv_scales, arrived
    stream = PageStream(g, items, tables, pool, scales, buffers)
    i = pl.program_id(0)

    @pl.when(i == 0)
    def _():
        stream.prime()

    q = q_ref[0]

    def block(first_key, slot, state: Softmax) -> Softmax:
        keys = first_key + jax.lax.broadcasted_iota(jnp.int32, (1, g.block), 1)
        mask = (keys >= items.lo[i]) & (keys < items.hi[i])
        if g.tail_words:
            mask &= tail_allows(keys, tail_ref[0], items.tail[i], first_key)

        @pl.when(stream.may_hold_garbage(i, first_key))
        def _():
            stream.clear_values(slot, mask.astype(jnp.float32))

        scores = product(q, stream.keys(slot), (-1, -1))
        if g.scaled:
            scores *= _head_scales(stream, slot, 0)
        if g.soft_cap is not None:
            scores = g.soft_cap * jnp.tanh(scores / g.soft_cap)

        def weigh(p):
            if g.scaled:
                p = jnp.where(mask[None], p * _head_scales(stream, slot, g.value_scale_row), 0.0)
            values = stream.values(slot)
            return product(p.astype(values.dtype), values, (-1, -2))

        return absorb(state, scores, mask[None], weigh)

    rows = (g.kv_heads, g.group)
    state = Softmax(
        jnp.full((*rows, 1), NEVER, jnp.float32),
        jnp.zeros((*rows, 1), jnp.float32),
        jnp.zeros((*rows, g.v_lanes), jnp.float32),
    )
    o, lse = finish(stream.walk(i, block, state), sinks_ref[...])
    o_ref[0] = o
    for ref in lse_ref:
        ref[0] = lse


def _head_scales(stream: PageStream, slot, first_row: int) -> Array:
    """`[kv_heads, 1, block]`."""
    rows = [stream.scale_row(slot, first_row + h) for h in range(stream.geometry.kv_heads)]
    return jnp.stack(rows)


def decode(
    geometry: Geometry, items: Items, tables, q, tail, sinks, pool, scales, cost: Any
) -> list[Array]:
    """`q[S, kv_heads, group, q_lanes]` to float32 `[S, kv_heads, group, v_lanes]`, maybe an lse."""
    g = geometry
    seqs, rows = q.shape[0], (g.kv_heads, g.group)
    widths = [g.v_lanes, 1][: 1 + g.with_lse]
    scratch = PageStream.scratch(g, pool.dtype, scales.shape[1:])

    def of_item(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), lambda i, *_: (i,) + (0,) * len(shape))

    return pl.pallas_call(
        functools.partial(_body, geometry=g),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(items) + 1,
            grid=(seqs,),
            in_specs=[
                of_item(*rows, g.q_lanes),
                of_item(*tail.shape[1:]),
                pl.BlockSpec(sinks.shape, lambda i, *_: (0, 0, 0)),
                pl.BlockSpec(memory_space=compat.HBM),
                pl.BlockSpec(memory_space=compat.HBM),
            ],
            out_specs=[of_item(*rows, width) for width in widths],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct((seqs, *rows, width), jnp.float32) for width in widths],
        compiler_params=SEQUENTIAL,
        cost_estimate=cost,
        interpret=g.interpret,
        name="paged_attention_decode",
    )(*items, tables, q, tail, sinks, pool, scales)
