"""Attention of ragged query tokens over paged KV: one operation for prefill, decode and the rest.

Each query token sees the indices `[visible_lo, visible_hi)` of its own sequence, and in the last W
of its keys only those whose bit in `tail_mask` is set. Prefill, decode, sliding windows, scattered
recompute, block diffusion, prefix-LM and trees differ in these integers and in nothing else.
"""

from typing import Any

import jax
from jaxtyping import Array, Float, Int, UInt32

from kvjax.pallas_kernels.dispatch import Operation, later
from kvjax.pallas_kernels.page_ops import Pages
from kvjax.pallas_kernels.paged_attention import cpu, reference, xla
from kvjax.pallas_kernels.paged_attention.arguments import check_arguments

__all__ = ["check_arguments", "paged_attention"]

_attend = Operation(
    "paged_attention",
    {"cpu": ("cpu", "xla"), "*": ("xla",)},
    {
        "cpu": cpu.paged_attention,
        "xla": xla.paged_attention,
        "reference": reference.paged_attention,
    },
    {"reference": "float64 numpy on the host, the specification: only by name, outside jit"},
    {"cpu": cpu.probe, "gpu": later("kvjax.pallas_kernels.hopper", "probe")},
)
_attend.register(
    "gpu", later("kvjax.pallas_kernels.paged_attention.gpu", "paged_attention"), platforms=("gpu",)
)
_attend.register(
    "tpu", later("kvjax.pallas_kernels.paged_attention.tpu", "paged_attention"), platforms=("tpu",)
)
_attend.probes["tpu"] = later("kvjax.pallas_kernels.compat", "probe_tpu")


def paged_attention(
    q: Float[Array, "tokens q_heads k_width"],
    pages: Pages,
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
    checks: bool = False,
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
        It is what tells packed latent pages from packed keys and values.
      max_query_len: static bound on the tokens per sequence; 1 selects the decode body alone.
      return_lse: also return the log-sum-exp of each row, `[tokens, q_heads]`.
      checks: also check values that are being traced; see `kvjax.pallas_kernels.checked`.

    A row that sees nothing gives zeros and an lse of -inf. Slots that no row of a sequence may see
    are never read into a result, whatever they hold. A row's bits do not depend on its batch.

    Raises:
      ValueError: shapes or dtypes that contradict each other; starts that fall, an interval
        beyond its sequence's `kv_len`, a visible page id out of range, where values are at hand.
      ExceptionGroup: no backend accepts the inputs; it holds every reason.
    """
    query_starts, kv_lens, visible_hi = check_arguments(
        q, pages, block_tables, query_starts, kv_lens, visible_lo, visible_hi,
        tail_mask=tail_mask, sinks=sinks, value_width=value_width, checks=checks,
    )  # fmt: skip
    with jax.named_scope("paged_attention"):
        return _attend(
            q, pages, block_tables, query_starts, kv_lens, visible_lo, visible_hi,
            scale=scale, tail_mask=tail_mask, soft_cap=soft_cap, sinks=sinks,
            value_width=value_width, max_query_len=max_query_len, return_lse=return_lse,
            backend=backend,
        )  # fmt: skip
