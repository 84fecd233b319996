"""Page operations as XLA gathers and scatters: any platform, in place when donated."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.pallas_kernels.page_ops import LayerPages


def _encode(x: Array, dtype: jnp.dtype) -> Array:
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(dtype)


def decode(x: Array) -> Array:
    """Numbers of gathered page contents: bfloat16 where the array holds its bits."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def _past_the_end(ids: Array, size: int) -> Array:
    return jnp.where(ids < 0, size, ids)  # so that mode="drop" drops it


def empty_pool(pool: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding | None) -> Array:
    """See `kvjax.pallas_kernels.empty_pool`: zeros."""
    return jnp.zeros(pool.shape, pool.dtype, device=sharding)


def write_slots(pages: LayerPages, k: Array, v: Array | None, slots: Array) -> LayerPages:
    """See `kvjax.pallas_kernels.write_slots`."""
    slots = _past_the_end(slots, pages.num_pages * pages.page_size)
    page, offset = slots // pages.page_size, slots % pages.page_size

    def scatter(pool: Array, new: Array) -> Array:
        return pool.at[page, :, offset].set(_encode(new, pool.dtype), mode="drop")

    return LayerPages(scatter(pages.k, k), None if v is None else scatter(_some(pages.v), v))


def gather_slots(pages: LayerPages, slots: Array) -> tuple[Array, Array | None]:
    """See `kvjax.pallas_kernels.gather_slots`."""
    page, offset = slots // pages.page_size, slots % pages.page_size

    def gather(pool: Array) -> Array:
        return jnp.where(slots[:, None, None] < 0, 0, decode(pool[page, :, offset]))

    return gather(pages.k), None if pages.v is None else gather(pages.v)


def copy_pages(pages: LayerPages, src: Array, dst: Array) -> LayerPages:
    """See `kvjax.pallas_kernels.copy_pages`."""
    dst = _past_the_end(dst, pages.num_pages)

    def copy(pool: Array) -> Array:
        return pool.at[dst].set(pool[src], mode="drop")

    return LayerPages(copy(pages.k), None if pages.v is None else copy(pages.v))


def _some(x: Array | None) -> Array:
    assert x is not None
    return x
