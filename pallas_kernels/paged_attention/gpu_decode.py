"""Decode on Mosaic GPU: few tiles of query rows, the keys of each cut into splits."""

import types
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.pallas_kernels.compat import mosaic_gpu as plgpu
from kvjax.pallas_kernels.hopper import ROWS
from kvjax.pallas_kernels.paged_attention.gpu_blocks import run_tile
from kvjax.pallas_kernels.paged_attention.gpu_walk import (
    DENSE_HI,
    DENSE_LO,
    FIRST,
    KV_LEN,
    LAST,
    SEQ,
    Walk,
)


def attend_splits(
    walk: Walk, q: Any, lo: Any, hi: Any, tail: Any, bounds: Any, tables: Any, *pools: Any,
    split: int, num_rows: int,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Partial attention of every tile over every `split` keys of its sequence.

    Splits start at multiples of `split` whatever the batch holds, so that a row's bits do not
    depend on it. `q` is `[tiles, heads, consumers, 64, width]`. Returns `o[tiles, kv_heads,
    splits, consumers, num_rows, v_width]` and `lse[tiles, kv_heads, splits, consumers, 64]`; where
    a whole split has an lse of -inf, its output is unwritten.
    """
    tiles, heads = q.shape[:2]
    splits = -(-tables.shape[1] * walk.page_size // split)

    def paged_attention_decode(q, lo, hi, tail, bounds, tables, *refs, **scratch):
        *held, o, lse = refs
        part, head = jax.lax.axis_index("split"), jax.lax.axis_index("head")
        tile = jax.lax.axis_index("tile")
        first = jnp.maximum(bounds[tile, FIRST], part * split)
        last = jnp.minimum(bounds[tile, LAST], (part + 1) * split)
        seq = bounds[tile, SEQ]
        run_tile(
            walk, types.SimpleNamespace(**scratch),
            rows=(q.at[tile, head], lo.at[tile], hi.at[tile], tail.at[tile]),
            pools=held, page_id=lambda i: tables[seq, i], head=head,
            kv_len=bounds[tile, KV_LEN], keys=(first, last),
            dense=(bounds[tile, DENSE_LO], bounds[tile, DENSE_HI]),
            o=o.at[tile, head, part], lse=lse.at[tile, head, part], num_rows=num_rows,
        )  # fmt: skip

    shape = (tiles, heads, splits, walk.consumers)
    return plgpu.kernel(
        paged_attention_decode,
        out_type=(
            jax.ShapeDtypeStruct((*shape, num_rows, walk.v_width), jnp.float32),
            jax.ShapeDtypeStruct((*shape, ROWS), jnp.float32),
        ),
        scratch_types=walk.scratch(),
        grid=(splits, heads, tiles),
        grid_names=("split", "head", "tile"),
        num_threads=walk.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=walk.interpret,
    )(q, lo, hi, tail, bounds, tables, *pools)
