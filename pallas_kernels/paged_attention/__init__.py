"""Attention of ragged query tokens over paged KV: one operation for prefill, decode and the rest.

Each query token sees the indices `[visible_lo, visible_hi)` of its own sequence, and in the last W
of its keys only those whose bit in `tail_mask` is set. Prefill, decode, sliding windows, scattered
recompute, block diffusion, prefix-LM and trees differ in these integers and in nothing else.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from kvjax.pallas_kernels.dispatch import Operation
from kvjax.pallas_kernels.page_ops import LayerPages
from kvjax.pallas_kernels.paged_attention import cpu, reference, xla

_attend = Operation(
    "paged_attention",
    {"cpu": ("cpu", "xla"), "*": ("xla",)},
    {
        "cpu": cpu.paged_attention,
        "xla": xla.paged_attention,
        "reference": reference.paged_attention,
    },
    {"reference": "float64 numpy on the host, the specification: only by name, outside jit"},
    {"cpu": cpu.probe},
)


def paged_attention(
    q: Float[Array, "tokens q_heads k_width"],
    pages: LayerPages,
    block_tables: Int[Array, "seqs pages_per_seq"],
    query_starts: Int[Array, " seqs_plus_1"],
    kv_lens: Int[Array, " seqs"],
    visible_lo: Int[Array, " tokens"],
    visible_hi: Int[Array, " tokens"],
    *,
    scale: float,
    tail_mask: UInt32[Array, "tokens words"] | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " q_heads"] | None = None,
    value_width: int | None = None,
    max_query_len: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention of each query token over its visible interval; float32 `[tokens, q_heads, v]`.

    Sequence `s` owns the tokens `[query_starts[s], query_starts[s + 1])` and the keys in the pages
    `block_tables[s]`, of which the first `kv_lens[s]` slots are written. Tokens past
    `query_starts[-1]` are padding: their rows are unspecified but finite.

    Args:
      tail_mask: bit `j` of a token's row stands for index `kv_len - W + j`, W = 32 * words.
      soft_cap: scores become `soft_cap * tanh(score / soft_cap)`.
      sinks: one learned score per head that takes part in the softmax and adds no value.
      value_width: latent attention: values are the leading `value_width` channels of the keys.
      max_query_len: static bound on the tokens per sequence; 1 selects the decode body alone.
      return_lse: also return the log-sum-exp of each row, `[tokens, q_heads]`.

    A row that sees nothing gives zeros and an lse of -inf. Slots that no row of a sequence may see
    are never read into a result, whatever they hold. A row's bits do not depend on its batch.

    Raises:
      ValueError: shapes that contradict each other, while tracing.
      ExceptionGroup: no backend accepts the inputs; it holds every reason.
    """
    tokens, q_heads, k_width = q.shape
    kv_heads = pages.k.shape[1]
    if q_heads % kv_heads:
        raise ValueError(f"{q_heads} query heads are not a multiple of {kv_heads} KV heads")
    if pages.k.shape[3] != k_width:
        raise ValueError(f"queries are {k_width} wide, keys {pages.k.shape[3]}")
    if (pages.v is None) != (value_width is not None):
        raise ValueError(f"value_width={value_width} but pages hold values: {pages.v is not None}")
    seqs = block_tables.shape[0]
    if query_starts.shape != (seqs + 1,) or kv_lens.shape != (seqs,):
        raise ValueError(
            f"expected {seqs + 1} query starts and {seqs} lengths for {block_tables.shape=}, got "
            f"{query_starts.shape=} {kv_lens.shape=}"
        )
    if visible_lo.shape != (tokens,) or visible_hi.shape != (tokens,):
        raise ValueError(
            f"expected {tokens} intervals, got {visible_lo.shape=} {visible_hi.shape=}"
        )
    if tail_mask is not None and (tail_mask.shape[0] != tokens or tail_mask.dtype != np.uint32):
        raise ValueError(f"tail_mask must be uint32[{tokens}, words], got {tail_mask.shape}")
    if sinks is not None and sinks.shape != (q_heads,):
        raise ValueError(f"expected one sink per query head ({q_heads}), got {sinks.shape=}")
    with jax.named_scope("paged_attention"):
        return _attend(
            q, pages, block_tables, query_starts, kv_lens, visible_lo, visible_hi,
            scale=scale, tail_mask=tail_mask, soft_cap=soft_cap, sinks=sinks,
            value_width=value_width, max_query_len=max_query_len, return_lse=return_lse,
            backend=backend,
        )  # fmt: skip
