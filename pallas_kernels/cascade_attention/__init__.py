"""Attention of sequences that share a prefix: the prefix is read once for the group.

Two calls of `paged_attention` and a `merge_states` (FlashInfer, arXiv 2501.01005, section 3.1.2;
Hydragen, arXiv 2402.05099, section 3). Nothing needs alignment: the split is an index per token.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from kvjax.pallas_kernels.cascade_attention.cost import (
    CascadePlan,
    cascade_bytes,
    cascade_refusal,
    plan_cascade,
)
from kvjax.pallas_kernels.checks import Checks
from kvjax.pallas_kernels.merge_states import merge_states
from kvjax.pallas_kernels.page_ops import Pages
from kvjax.pallas_kernels.paged_attention import check_arguments, paged_attention

__all__ = [
    "CascadePlan",
    "cascade_attention",
    "cascade_bytes",
    "cascade_refusal",
    "plan_cascade",
]


def cascade_attention(
    q: Float[Array, "tokens q_heads k_width"],
    pages: Pages,
    block_tables: Int[Array, "seqs pages_per_seq"],
    query_starts: Int[Array, " seqs_plus_1"],
    kv_lens: Int[Array, " seqs"],
    visible_lo: Int[Array, " tokens"],
    visible_hi: Int[Array, " tokens"],
    *,
    group_starts: Int[Array, " groups_plus_1"],
    prefix_lens: Int[Array, " groups"],
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
    """What `paged_attention` gives for the same arguments, up to rounding, with less reading.

    Group `g` is the sequences `[group_starts[g], group_starts[g + 1])`; they share the KV of their
    first `prefix_lens[g]` indices, whole pages or not, which is read through the block table of the
    group's first sequence, once for all of the group's queries. `group_starts` runs from 0 to the
    number of sequences; a group may be empty, and a sequence that shares nothing is a group of its
    own with a prefix of 0. `backend` names the backend of both calls of `paged_attention`.

    Worth it when `plan_cascade` of the batch says so.

    Raises:
      ValueError: as `paged_attention`; also groups that do not cover the sequences, or a prefix
        longer than a member.
      ExceptionGroup: no backend accepts the inputs; it holds every reason.
    """
    query_starts, kv_lens, visible_hi = check_arguments(
        q, pages, block_tables, query_starts, kv_lens, visible_lo, visible_hi,
        tail_mask=tail_mask, sinks=sinks, value_width=value_width, checks=checks,
    )  # fmt: skip
    groups = prefix_lens.shape[0]
    if group_starts.shape != (groups + 1,) or not groups:
        raise ValueError(
            f"expected one more group start than prefixes, got {group_starts.shape=} "
            f"{prefix_lens.shape=}"
        )
    group_starts, prefix_lens = _check_groups(group_starts, prefix_lens, kv_lens, checks)
    options: dict[str, Any] = {"scale": scale, "tail_mask": None, "soft_cap": soft_cap,
                               "value_width": value_width, "return_lse": True,
                               "backend": backend}  # fmt: skip
    with jax.named_scope("cascade_attention"):
        arrays = (block_tables, query_starts, kv_lens, visible_lo, visible_hi)
        tables, starts, lens, lo, hi = map(jnp.asarray, arrays)
        group_starts, prefix_lens = jnp.asarray(group_starts), jnp.asarray(prefix_lens)
        split = _splits(q.shape[0], starts, lens, group_starts, prefix_lens, tail_mask)
        first = jnp.minimum(group_starts[:-1], tables.shape[0] - 1)
        shared = paged_attention(
            q, pages, tables[first], starts[group_starts], prefix_lens, lo, jnp.minimum(hi, split),
            **options,
        )  # fmt: skip
        own = paged_attention(
            q, pages, tables, starts, lens, jnp.maximum(lo, split), hi,
            **options | {"tail_mask": tail_mask, "sinks": sinks, "max_query_len": max_query_len},
        )  # fmt: skip
        out, lse = merge_states(*(jnp.stack(pair) for pair in zip(shared, own, strict=True)))
    return (out, lse) if return_lse else out


def _check_groups(group_starts, prefix_lens, kv_lens, checks: bool):
    """`group_starts` and `prefix_lens`, harmless ones where a traced check fails."""
    seqs, groups = kv_lens.shape[0], prefix_lens.shape[0]
    check = Checks((group_starts, prefix_lens, kv_lens), traced=checks)
    if not check.active or not seqs:
        return group_starts, prefix_lens
    starts, prefixes, lens = check.arrays(group_starts, prefix_lens, kv_lens)
    check.within("group_starts", starts[:1], 0, 0)
    check.within("group_starts", starts[-1:], seqs, seqs)
    check.ascending("group_starts", starts)
    seq, xp = check.xp.arange(seqs), check.xp
    group = xp.clip(xp.searchsorted(starts, seq, side="right") - 1, 0, groups - 1)
    prefix = prefixes[group]
    check.forbid(
        "prefix_lens", prefix, (prefix < 0) | (prefix > lens), "be in 0..{limit} (kv_len)", lens
    )
    return check.spared(group_starts, 0), check.spared(prefix_lens, 0)


def _splits(
    tokens: int, query_starts, kv_lens, group_starts, prefix_lens, tail_mask
) -> Int[Array, " tokens"]:
    """Where each token's keys stop being the group's: before its sequence's masked tail."""
    t = jnp.arange(tokens, dtype=jnp.int32)
    seq = _last_at_or_before(query_starts, t)
    split = prefix_lens[_last_at_or_before(group_starts, seq)]
    if tail_mask is not None:
        split = jnp.minimum(split, jnp.maximum(kv_lens[seq] - 32 * tail_mask.shape[1], 0))
    return split


def _last_at_or_before(starts: Array, x: Array) -> Array:
    """The interval of ascending `starts` that holds each `x`; the last one beyond the end."""
    found = jnp.searchsorted(starts, x, side="right").astype(jnp.int32) - 1
    return jnp.clip(found, 0, starts.shape[0] - 2)
