"""Prefill on Mosaic GPU: tiles of many query rows of one sequence, all their keys in one walk."""

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


def attend_tiles(
    walk: Walk, q: Any, lo: Any, hi: Any, tail: Any, bounds: Any, tables: Any, *pools: Any
) -> tuple[jax.Array, jax.Array]:
    """Attention of every tile of `consumers * 64` rows over what its rows see.

    `q` is `[tiles, heads, consumers, 64, width]`. Returns `o` of the same shape in float32,
    unwritten where `lse[tiles, kv_heads, consumers, 64]` is -inf for the whole tile. Later tiles of
    a sequence see more keys, so the last tile starts first.
    """
    tiles, heads = q.shape[:2]

    def paged_attention_prefill(q, lo, hi, tail, bounds, tables, *refs, **scratch):
        *held, o, lse = refs
        head, tile = jax.lax.axis_index("head"), tiles - 1 - jax.lax.axis_index("tile")
        seq = bounds[tile, SEQ]
        run_tile(
            walk, types.SimpleNamespace(**scratch),
            rows=(q.at[tile, head], lo.at[tile], hi.at[tile], tail.at[tile]),
            pools=held, page_id=lambda i: tables[seq, i], head=head,
            kv_len=bounds[tile, KV_LEN], keys=(bounds[tile, FIRST], bounds[tile, LAST]),
            dense=(bounds[tile, DENSE_LO], bounds[tile, DENSE_HI]),
            o=o.at[tile, head], lse=lse.at[tile, head], num_rows=ROWS,
        )  # fmt: skip

    shape = (tiles, heads, walk.consumers, ROWS)
    return plgpu.kernel(
        paged_attention_prefill,
        out_type=(
            jax.ShapeDtypeStruct((*shape, walk.v_width), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        scratch_types=walk.scratch(),
        grid=(heads, tiles),
        grid_names=("head", "tile"),
        num_threads=walk.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=walk.interpret,
    )(q, lo, hi, tail, bounds, tables, *pools)
