"""Attention mass in float64 numpy, one row at a time: the specification of every backend."""

from itertools import pairwise

import numpy as np

from kvjax.pallas_kernels.attention_mass.result import AttentionMass
from kvjax.pallas_kernels.page_ops.reference import split_only
from kvjax.pallas_kernels.paged_attention.reference import keys_at, seen_indices


def attention_mass(
    q, lse, pages, block_tables, query_starts, kv_lens, visible_lo, visible_hi, *,
    scale, segment_starts, tail_mask, soft_cap, value_width,
) -> AttentionMass:  # fmt: skip
    """See `kvjax.pallas_kernels.attention_mass`."""
    del value_width  # values are not read
    q, lse = np.asarray(q).astype(np.float64), np.asarray(lse).astype(np.float64)
    pages, group = split_only(pages), q.shape[1] // pages.kv_heads
    columns = np.zeros((len(kv_lens), block_tables.shape[1] * pages.page_size))
    if segment_starts is None:
        edges = np.zeros((len(kv_lens), 1), int)  # no segments
    else:
        edges = np.asarray(segment_starts)
    segments = np.zeros((q.shape[0], edges.shape[1] - 1))
    for s in range(len(kv_lens)):
        for t in range(int(query_starts[s]), int(query_starts[s + 1])):
            seen = seen_indices(t, int(kv_lens[s]), visible_lo, visible_hi, tail_mask)
            k = keys_at(pages, np.asarray(block_tables)[s], seen)  # [keys, kv_heads, k_width]
            for h in range(q.shape[1]):
                scores = k[:, h // group] @ q[t, h] * scale
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                if not len(seen) or lse[t, h] == -np.inf:
                    continue
                p = np.exp(scores - lse[t, h])
                columns[s, seen] += p
                for g, (first, last) in enumerate(pairwise(edges[s])):
                    segments[t, g] += p[(seen >= first) & (seen < last)].sum()
    return AttentionMass(columns, None if segment_starts is None else segments)  # type: ignore[arg-type]
