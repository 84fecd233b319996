"""Paged attention in float64 numpy, one row at a time: the specification of every backend."""

from typing import Any

import numpy as np

from kvjax.pallas_kernels.page_ops.reference import decode


def paged_attention(
    q, pages, block_tables, query_starts, kv_lens, visible_lo, visible_hi, *,
    scale, tail_mask=None, soft_cap=None, sinks=None, value_width=None, max_query_len=None,
    return_lse=False,
):  # fmt: skip
    """See `kvjax.pallas_kernels.paged_attention`. Rows of padding are zeros here."""
    del max_query_len  # a hint for the compiled backends
    q = np.asarray(q).astype(np.float64)
    page_size, kv_heads = pages.page_size, pages.k.shape[1]
    width: Any = value_width if pages.v is None else pages.v.shape[3]
    out = np.zeros((q.shape[0], q.shape[1], width))
    lse = np.full(q.shape[:2], -np.inf)
    for s in range(len(kv_lens)):
        for t in range(int(query_starts[s]), int(query_starts[s + 1])):
            seen = [
                i
                for i in range(int(visible_lo[t]), min(int(visible_hi[t]), int(kv_lens[s])))
                if tail_mask is None or _in_tail(tail_mask[t], i, int(kv_lens[s]))
            ]
            page = np.asarray(block_tables)[s, np.array(seen, int) // page_size]
            offset = np.array(seen, int) % page_size
            k = decode(np.asarray(pages.k)[page, :, offset])  # [keys, kv_heads, k_width]
            v = k[..., :width] if pages.v is None else decode(np.asarray(pages.v)[page, :, offset])
            for h in range(q.shape[1]):
                scores = k[:, h // (q.shape[1] // kv_heads)] @ q[t, h] * scale
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                everything = scores if sinks is None else np.append(scores, float(sinks[h]))
                if not seen and sinks is None:
                    continue
                top = everything.max()
                lse[t, h] = top + np.log(np.exp(everything - top).sum())
                weights = np.exp(scores - lse[t, h])
                out[t, h] = weights @ v[:, h // (q.shape[1] // kv_heads)] if seen else 0.0
    return (out, lse) if return_lse else out


def _in_tail(words, index: int, kv_len: int) -> bool:
    """Whether the mask lets `index` through; indices before the tail always pass."""
    j = index - (kv_len - 32 * len(words))
    return j < 0 or bool(int(words[j // 32]) >> (j % 32) & 1)
