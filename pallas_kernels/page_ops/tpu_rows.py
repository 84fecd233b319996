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

from kvjax.pallas_kernels import compat
from kvjax.pallas_kernels.page_ops.pages import stored_dtype
from kvjax.pallas_kernels.page_ops.quantise import from_bits, to_bits

MOST_RUNS = 32768  # three integers each, of a MiB of scalar memory


class Runs(NamedTuple):
    """Runs of rows, int32 `[n]`; only the first `used[0]` are in use."""

    src: Array  # first row, counted over all tiles of the source
    dst: Array
    length: Array
    used: Array  # [1]


def tile_rows(dtype: Any) -> int:
    """Rows of one tile."""
    return 32 // jnp.dtype(dtype).itemsize


def runs(src: Array, dst: Array, rows: int) -> Runs:
    """The fewest runs that bring row `src[i]` to `dst[i]`; a `dst` of -1 is left out."""
    n, last = dst.shape[0], jnp.iinfo(jnp.int32).max
    src, dst = src.astype(jnp.int32), jnp.where(dst < 0, last, dst).astype(jnp.int32)
    dst, src = jax.lax.sort((dst, src), num_keys=1)
    goes_on = (jnp.diff(src) == 1) & (jnp.diff(dst) == 1)
    goes_on &= (src[1:] % rows != 0) & (dst[1:] % rows != 0)
    begins = jnp.append(True, ~goes_on) & (dst != last)
    wanted = jnp.sum(dst != last)
    start, src, dst = jax.lax.sort(
        (jnp.where(begins, jnp.arange(n, dtype=jnp.int32), n), src, dst), num_keys=1
    )
    end = jnp.minimum(jnp.append(start[1:], n), wanted)
    real = start < n
    return Runs(
        src=jnp.where(real, src, 0),
        dst=jnp.where(real, dst, 0),
        length=jnp.where(real, end - start, 0).astype(jnp.int32),
        used=jnp.maximum(jnp.sum(begins, dtype=jnp.int32), 1)[None],  # length 0 changes nothing
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


def _body(*refs, rows: int, axis: int, combine: Callable[[Array, Array], Array] | None) -> None:
    todo, (src_ref, *old_ref, out_ref) = Runs(*refs[:4]), refs[4:]
    i = pl.program_id(0)
    before = jnp.maximum(i - 1, 0)

    if old_ref:

        @pl.when((i == 0) | (todo.dst[before] // rows != todo.dst[i] // rows))
        def _():
            out_ref[...] = old_ref[0][...]

    first, size = todo.dst[i] % rows, out_ref.shape[1 + axis]
    shift = (first - todo.src[i] % rows) % size
    moved = pltpu.roll(_widened(src_ref[0]), shift, axis=axis)
    old = _widened(out_ref[0])
    shape = tuple(size if a == axis else 1 for a in range(3))
    row = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    ours = (row >= first) & (row < first + todo.length[i])
    new = moved if combine is None else combine(old, moved)
    out_ref[0] = _narrowed(jnp.where(ours, new, old), out_ref.dtype)


def merge_rows(
    source: Array,
    pool: Array | None,
    todo: Runs,
    *,
    num_tiles: int = 0,
    per_lane: int = 0,
    half: int | None = None,
    combine: Callable[[Array, Array], Array] | None = None,
    interpret: Any = False,
    name: str,
) -> Array:
    """`pool` with the runs of `source` in it, in place where `pool` is donated.

    Both are `[pages, heads, page_size, lanes]`. Without a pool the result is a new one of
    `num_tiles` pages of one tile each, and rows that no run fills are unspecified. The source
    is not the pool itself. `combine(old, new)` makes the rows of a tile, `[heads, rows, lanes]`
    with 32 bits each, from what is there and what is moved there, if it is not a plain copy.
    With `per_lane`, what is moved are not rows but lanes, of which a page uses that many. With
    `half`, without a pool, only that half of the source's lanes is read.
    """
    like = source if pool is None else pool
    dtype, rows = like.dtype, per_lane or tile_rows(like.dtype)
    height = like.shape[2] if per_lane else rows  # of a tile in memory
    lanes = source.shape[3] // (1 if half is None else 2)
    shape = (num_tiles, source.shape[1], height, lanes) if pool is None else pool.shape

    def tile_of(shape: tuple[int, ...], field: str, lanes: int, part: int = 0) -> pl.BlockSpec:
        per_page = shape[2] // height

        def index(i, *scalars):
            tile = getattr(Runs(*scalars), field)[i] // rows
            return tile // per_page, 0, tile % per_page, part

        return pl.BlockSpec((1, shape[1], height, lanes), index)

    in_specs = [tile_of(source.shape, "src", lanes, half or 0)]
    target = tile_of(shape, "dst", shape[3])
    if pool is not None:
        in_specs.append(target)
    # A pool that is donated as it is cannot be held: XLA takes its two memory spaces for different
    # shapes (libtpu 0.0.42). The scales are small enough to be copied, and are reshaped on the way.
    if pool is None:
        source = compat.in_hbm(source, interpret)
    elif per_lane:
        pool = compat.in_hbm(pool, interpret)
    moved, kept = (
        todo.src.shape[0] * heads * height * width // rows * item
        for heads, width, item in (
            (source.shape[1], lanes, source.dtype.itemsize), (shape[1], shape[3], dtype.itemsize),
        )
    )  # fmt: skip
    return pl.pallas_call(
        functools.partial(_body, rows=rows, axis=2 if per_lane else 1, combine=combine),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(todo),
            grid=(todo.used[0],),
            in_specs=in_specs,
            out_specs=target,
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


def as_lane_tiles(x: Array, slots: int, lanes: int) -> Array:
    """Scales `[tokens, rows]` as pages of `slots` tokens, `[tiles, 1, rows, lanes]`."""
    x = jnp.pad(x, ((0, -x.shape[0] % slots), (0, 0)))
    x = x.reshape(-1, slots, x.shape[1]).swapaxes(1, 2)[:, None]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, lanes - slots)))


def from_lane_tiles(x: Array, slots: int, tokens: int) -> Array:
    """What `as_lane_tiles` was made of."""
    x = x[:, 0, :, :slots].swapaxes(1, 2)
    return x.reshape(-1, x.shape[2])[:tokens]


def parts(x: Array) -> list[Array]:
    """`x` in pieces of at most `MOST_RUNS` tokens."""
    return [x[i : i + MOST_RUNS] for i in range(0, x.shape[0], MOST_RUNS)]


def stored_pool(pages: Any) -> None:
    """Raises NotImplementedError unless whole tiles make up the pages."""
    rows = tile_rows(pages.kv.dtype)
    if pages.page_size % rows:
        raise NotImplementedError(
            f"tpu: page_size={pages.page_size} of {stored_dtype(pages.kv.dtype)} is not a multiple "
            f"of its {rows} rows per tile"
        )
