"""Rows in and out of packed pages on Mosaic TPU: one kernel that merges runs of rows into tiles.

A slot is a row of a page, and the memory of a TPU holds rows in tiles of 8 to 32: less than a tile
cannot be moved. So everything is a list of *runs*: rows `[a, a + n)` of a source tile become rows
`[b, b + n)` of a destination tile, which is read, merged in VMEM and written back. Runs are sorted
by destination: a tile is open during consecutive grid steps and is read and written once, and the
pipeline of Pallas copies the next tiles meanwhile.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kvjax.pallas_kernels.page_ops.pages import stored_dtype
from kvjax.pallas_kernels.page_ops.quantise import from_bits, to_bits


class Runs(NamedTuple):
    """Runs of rows, int32 `[n]`; only the first `count[0]` are in use."""

    src: Array  # first row, counted over all tiles of the source
    dst: Array
    length: Array
    count: Array  # [1]


def tile_rows(dtype: Any) -> int:
    """Rows of one tile."""
    return 32 // jnp.dtype(dtype).itemsize


def runs(src: Array, dst: Array, rows: int, *, is_sorted: bool = False) -> Runs:
    """The fewest runs that bring row `src[i]` to `dst[i]`; a `dst` of -1 is left out."""
    n = dst.shape[0]
    last = jnp.iinfo(jnp.int32).max
    dst = jnp.where(dst < 0, last, dst)
    if not is_sorted:
        order = jnp.argsort(dst)
        src, dst = src[order], dst[order]
    goes_on = (jnp.diff(src) == 1) & (jnp.diff(dst) == 1)
    goes_on &= (src[1:] % rows != 0) & (dst[1:] % rows != 0)
    begins = jnp.append(True, ~goes_on) & (dst != last)
    run = jnp.cumsum(begins) - 1
    count = jnp.sum(begins, dtype=jnp.int32)
    at = jnp.where(begins, run, n)
    zeros = jnp.zeros(n, jnp.int32)
    return Runs(
        src=zeros.at[at].set(src.astype(jnp.int32), mode="drop"),
        dst=zeros.at[at].set(dst.astype(jnp.int32), mode="drop"),
        length=zeros.at[jnp.where(dst == last, n, run)].add(1, mode="drop"),
        count=jnp.maximum(count, 1)[None],  # a run of length 0 rewrites what it finds
    )


def _widened(x: Array) -> Array:
    """The same numbers in 32 bits, of which single rows can be moved. int8 and float8 as bits."""
    if x.dtype.itemsize == 1:
        return jax.lax.bitcast_convert_type(x, jnp.int8).astype(jnp.int32)
    return from_bits(x).astype(jnp.float32)


def _narrowed(x: Array, physical: Any) -> Array:
    if jnp.dtype(physical).itemsize == 1:
        return jax.lax.bitcast_convert_type(x.astype(jnp.int8), physical)
    return to_bits(x, physical)


def _body(*refs, rows: int, combine: Callable[[Array, Array], Array] | None) -> None:
    todo, (src_ref, *old_ref, out_ref) = Runs(*refs[:4]), refs[4:]
    i = pl.program_id(0)
    before = jnp.maximum(i - 1, 0)

    if old_ref:

        @pl.when((i == 0) | (todo.dst[before] // rows != todo.dst[i] // rows))
        def _():
            out_ref[...] = old_ref[0][...]

    first = todo.dst[i] % rows
    shift = (first - todo.src[i]) % rows
    moved = pltpu.roll(_widened(src_ref[0]), shift, axis=1)
    old = _widened(out_ref[0])
    row = jax.lax.broadcasted_iota(jnp.int32, (1, rows, 1), 1)
    ours = (row >= first) & (row < first + todo.length[i])
    new = moved if combine is None else combine(old, moved)
    out_ref[0] = _narrowed(jnp.where(ours, new, old), out_ref.dtype)


def merge_rows(
    source: Array,
    pool: Array | None,
    todo: Runs,
    *,
    num_tiles: int = 0,
    combine: Callable[[Array, Array], Array] | None = None,
    interpret: Any = False,
    name: str,
) -> Array:
    """`pool` with the runs of `source` in it, in place where `pool` is donated.

    Both are `[pages, heads, page_size, lanes]`. Without a pool the result is a new one of
    `num_tiles` pages of one tile each, and rows that no run fills are unspecified. The source
    is not the pool itself. `combine(old, new)` makes the rows of a tile, `[heads, rows, lanes]`
    with 32 bits each, from what is there and what is moved there, if it is not a plain copy.
    """
    rows = tile_rows(source.dtype if pool is None else pool.dtype)
    if pool is None:
        shape = (num_tiles, source.shape[1], rows, source.shape[3])
    else:
        shape = pool.shape
    dtype = source.dtype if pool is None else pool.dtype

    def tile_of(shape: tuple[int, ...], field: str) -> pl.BlockSpec:
        per_page = shape[2] // rows

        def index(i, *scalars):
            tile = getattr(Runs(*scalars), field)[i] // rows
            return tile // per_page, 0, tile % per_page, 0

        return pl.BlockSpec((1, shape[1], rows, shape[3]), index)

    in_specs = [tile_of(source.shape, "src")]
    if pool is not None:
        in_specs.append(tile_of(shape, "dst"))
    count = todo.src.shape[0]
    moved = count * (source.shape[1] * source.shape[3] * source.dtype.itemsize)
    kept = count * shape[1] * shape[3] * jnp.dtype(dtype).itemsize
    return pl.pallas_call(
        functools.partial(_body, rows=rows, combine=combine),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(todo),
            grid=(todo.count[0],),
            in_specs=in_specs,
            out_specs=tile_of(shape, "dst"),
        ),
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        input_output_aliases={} if pool is None else {len(todo) + 1: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        # of contiguous rows; scattered ones move whole tiles
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=moved + kept * (1 if pool is None else 2)
        ),
        interpret=interpret,
        name=name,
    )(*todo, source, *([] if pool is None else [pool]))


def as_tiles(x: Array, dtype: Any) -> Array:
    """`[tokens, heads, lanes]` as pages of one tile of `dtype`, `[tiles, heads, rows, lanes]`."""
    rows = tile_rows(dtype)
    x = jnp.pad(x, ((0, -x.shape[0] % rows), (0, 0), (0, 0)))
    return x.reshape(-1, rows, *x.shape[1:]).swapaxes(1, 2)


def from_tiles(x: Array, tokens: int) -> Array:
    """What `as_tiles` was made of."""
    x = x.swapaxes(1, 2)
    return x.reshape(-1, *x.shape[2:])[:tokens]


def stored_pool(pages: Any) -> None:
    """Raises NotImplementedError unless whole tiles make up the pages."""
    rows = tile_rows(pages.kv.dtype)
    if pages.page_size % rows:
        raise NotImplementedError(
            f"tpu: page_size={pages.page_size} of {stored_dtype(pages.kv.dtype)} is not a multiple "
            f"of its {rows} rows per tile"
        )
