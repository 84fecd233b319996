"""Paged attention in float64 numpy, one row at a time: the specification of every backend."""

from typing import Any

import numpy as np

from kvjax.pallas_kernels.page_ops.pages import LayerPages
from kvjax.pallas_kernels.page_ops.reference import decode, split_only


def paged_attention(
    q, pages, block_tables, query_starts, kv_lens, visible_lo, visible_hi, *,
    scale, tail_mask=None, soft_cap=None, sinks=None, value_width=None, max_query_len=None,
    return_lse=False,
):  # fmt: skip
    """See `kvjax.pallas_kernels.paged_attention`. Rows of padding are zeros here."""
    del max_query_len  # a hint for the compiled backends
    q, pages = np.asarray(q).astype(np.float64), split_only(pages)
    group = q.shape[1] // pages.kv_heads
    width: Any = value_width if pages.v is None else pages.v.shape[3]
    out = np.zeros((q.shape[0], q.shape[1], width))
    lse = np.full(q.shape[:2], -np.inf)
    for s in range(len(kv_lens)):
        for t in range(int(query_starts[s]), int(query_starts[s + 1])):
            table = np.asarray(block_tables)[s]
            seen = seen_indices(t, int(kv_lens[s]), visible_lo, visible_hi, tail_mask)
            k = keys_at(pages, table, seen)
            v = k[..., :width] if pages.v is None else values_at(pages, table, seen)
            for h in range(q.shape[1]):
                scores = k[:, h // group] @ q[t, h] * scale
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                everything = scores if sinks is None else np.append(scores, float(sinks[h]))
                if not len(everything):
                    continue
                top = everything.max()
                lse[t, h] = top + np.log(np.exp(everything - top).sum())
                out[t, h] = np.exp(scores - lse[t, h]) @ v[:, h // group]
    return (out, lse) if return_lse else out


def seen_indices(t: int, kv_len: int, visible_lo, visible_hi, tail_mask) -> np.ndarray:
    """The indices that query token `t` attends to, in order."""
    return np.array(
        [
            i
            for i in range(int(visible_lo[t]), min(int(visible_hi[t]), kv_len))
            if tail_mask is None or _in_tail(tail_mask[t], i, kv_len)
        ],
        int,
    )


def keys_at(pages: LayerPages, table: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Float64 keys `[keys, kv_heads, k_width]` at the indices `seen` of one block table."""
    return _rows_at(pages.k, pages.k_scale, table, seen)


def values_at(pages: LayerPages, table: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Float64 values `[keys, kv_heads, v_width]` at the indices `seen` of one block table."""
    return _rows_at(pages.v, pages.v_scale, table, seen)


def _rows_at(pool, scale, table: np.ndarray, seen: np.ndarray) -> np.ndarray:
    size = pool.shape[2]
    page, offset = table[seen // size], seen % size
    return decode(
        np.asarray(pool)[page, :, offset],
        None if scale is None else np.asarray(scale)[page, :, offset],
    )


def _in_tail(words, index: int, kv_len: int) -> bool:
    """Whether the mask lets `index` through; indices before the tail always pass."""
    j = index - (kv_len - 32 * len(words))
    return j < 0 or bool(int(words[j // 32]) >> (j % 32) & 1)
