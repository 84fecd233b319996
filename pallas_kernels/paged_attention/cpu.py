"""Paged attention on a CPU as one C++ kernel, `cpu.cc`, that reads the pages where they lie."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.pallas_kernels import native
from kvjax.pallas_kernels.page_ops.pages import LayerPages, Pages
from kvjax.pallas_kernels.tuning import block_sizes, rule

_TARGET = "kvjax_paged_attention"
_PAGES = (np.float32, np.uint16, np.int8, np.uint8)  # numbers, or bits of bfloat16 and float8


@rule("paged_attention/cpu_tile")
def _tile(*, group: int, head_dim: int) -> dict[str, int]:
    """Rows that walk the keys together; results do not depend on it."""
    del group, head_dim
    return {"rows": 144}


def probe() -> None:
    """Raises NotImplementedError where the kernel cannot run at all."""
    if jax.default_backend() != "cpu":
        raise NotImplementedError(f"cpu: the platform is {jax.default_backend()}")
    native.register(Path(__file__).with_suffix(".cc"), _TARGET)


def paged_attention(
    q, pages: Pages, block_tables, query_starts, kv_lens, visible_lo, visible_hi, *,
    scale, tail_mask=None, soft_cap=None, sinks=None, value_width=None, max_query_len=None,
    return_lse=False,
):  # fmt: skip
    """See `kvjax.pallas_kernels.paged_attention`."""
    del max_query_len  # one body serves all
    if not isinstance(pages, LayerPages):
        raise NotImplementedError("cpu: packed pages")
    v, v_scale = (pages.v, pages.v_scale)
    if v is None:
        v, v_scale = pages.k, pages.k_scale
    width = v.shape[3] if value_width is None else value_width
    if pages.k.dtype not in _PAGES:
        names = ", ".join(np.dtype(dtype).name for dtype in _PAGES)
        raise NotImplementedError(f"cpu: pages are {pages.k.dtype}, not one of {names}")
    probe()
    tokens, heads, _ = q.shape
    if tail_mask is None:
        tail_mask = jnp.zeros((tokens, 0), jnp.uint32)
    if sinks is None:
        sinks = jnp.zeros((0,), jnp.float32)
    tile = block_sizes(
        "paged_attention/cpu_tile", group=heads // pages.k.shape[1], head_dim=q.shape[2]
    )
    out, lse = jax.ffi.ffi_call(
        _TARGET,
        (
            jax.ShapeDtypeStruct((tokens, heads, width), jnp.float32),
            jax.ShapeDtypeStruct((tokens, heads), jnp.float32),
        ),
    )(
        jnp.asarray(q, jnp.float32), pages.k, v, _or_none(pages.k_scale), _or_none(v_scale),
        block_tables, query_starts, kv_lens,
        visible_lo, visible_hi, tail_mask, jnp.asarray(sinks, jnp.float32),
        scale=np.float32(scale), soft_cap=np.float32(soft_cap or 0.0),
        tile_rows=np.int32(tile["rows"]),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _or_none(scale):
    return jnp.zeros((0, 0, 0), jnp.float32) if scale is None else scale
