"""A pool on a CPU that nothing has touched: the system commits its memory page by page."""

from functools import partial
from pathlib import Path

import jax
from jaxtyping import Array

from kvjax.pallas_kernels import native

_TARGET = "kvjax_empty_pool"


def probe() -> None:
    """Raises NotImplementedError where the handler cannot run at all."""
    if jax.default_backend() != "cpu":
        raise NotImplementedError(f"cpu: the platform is {jax.default_backend()}")
    native.register(Path(__file__).with_suffix(".cc"), _TARGET)


def empty_pool(pool: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding | None) -> Array:
    """See `kvjax.pallas_kernels.empty_pool`."""
    if sharding is not None:
        raise NotImplementedError("cpu: the pool is sharded over a mesh")
    probe()
    return _make(pool.shape, pool.dtype)


@partial(jax.jit, static_argnums=(0, 1))
def _make(shape: tuple[int, ...], dtype: jax.numpy.dtype) -> Array:
    return jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct(shape, dtype))()
