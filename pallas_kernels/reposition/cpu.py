"""Moving KV on a CPU as one C++ kernel, `cpu.cc`: every row is read once and written once."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.pallas_kernels import native
from kvjax.pallas_kernels.page_ops.pages import LayerPages, Pages

_TARGET = "kvjax_reposition"
_PAGES = (np.float32, np.uint16)  # numbers, or bits of bfloat16


def probe() -> None:
    """Raises NotImplementedError where the kernel cannot run at all."""
    if jax.default_backend() != "cpu":
        raise NotImplementedError(f"cpu: the platform is {jax.default_backend()}")
    native.register(Path(__file__).with_suffix(".cc"), _TARGET)


def reposition(
    pages: Pages, src_slots, dst_slots, cos, sin, *, patch_k, patch_v, frame, rotary_offset
) -> LayerPages:
    """See `kvjax.pallas_kernels.reposition`; `dst_slots=None` shifts keys in place."""
    del frame
    if not isinstance(pages, LayerPages):
        raise NotImplementedError("cpu: packed pages")
    if patch_k is not None or patch_v is not None:
        raise NotImplementedError("cpu: patches are products, which xla has")
    if pages.k.dtype not in _PAGES:
        raise NotImplementedError(f"cpu: pages are {pages.k.dtype}, not float32 or bfloat16")
    probe()
    src = jnp.asarray(src_slots, jnp.int32)
    dst = src if dst_slots is None else jnp.asarray(dst_slots, jnp.int32)
    k = jnp.asarray(pages.k)
    moves_values = pages.v is not None and dst_slots is not None
    v = jnp.asarray(pages.v) if moves_values else jnp.zeros((0, 0, 0, 0), k.dtype)
    new_k, new_v = jax.ffi.ffi_call(
        _TARGET,
        (jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        input_output_aliases={0: 0, 1: 1},
    )(
        k, v, src, dst, jnp.asarray(cos, jnp.float32), jnp.asarray(sin, jnp.float32),
        rotary_offset=np.int32(rotary_offset),
    )  # fmt: skip
    return LayerPages(new_k, new_v if moves_values else pages.v, None, None)
