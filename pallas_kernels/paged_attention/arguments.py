"""What attention-like operations check of their arguments: shapes, dtypes and values."""

import numpy as np

from kvjax.pallas_kernels.checks import Checks
from kvjax.pallas_kernels.page_ops.pages import LayerPages, Pages


def check_arguments(
    q, pages: Pages, block_tables, query_starts, kv_lens, visible_lo, visible_hi, *,
    tail_mask=None, sinks=None, value_width: int | None = None, checks: bool = False,
):  # fmt: skip
    """Raises ValueError, naming the argument and its value, if arguments contradict each other.

    Returns `(query_starts, kv_lens, visible_hi)` to go on with: where a traced check fails, they
    make the kernel read nothing.
    """
    check_shapes(q, pages, block_tables, query_starts, kv_lens, visible_lo, visible_hi,
                 tail_mask, sinks, value_width)  # fmt: skip
    check = Checks((block_tables, query_starts, kv_lens, visible_lo, visible_hi), traced=checks)
    if check.active and q.shape[0] and block_tables.shape[0]:
        _check_values(check, q.shape[0], pages, block_tables, query_starts, kv_lens, visible_lo,
                      visible_hi)  # fmt: skip
    return tuple(check.spared(x, 0) for x in (query_starts, kv_lens, visible_hi))


def _check_values(check: Checks, tokens: int, pages: Pages, tables, starts, kv_lens, lo, hi):
    """Starts do not fall, intervals lie in what is written, and what is visible has a page."""
    seqs, width = tables.shape
    tables, starts, kv_lens, lo, hi = check.arrays(tables, starts, kv_lens, lo, hi)
    xp = check.xp
    check.within("query_starts", starts, 0, tokens)
    check.ascending("query_starts", starts)
    check.within("kv_lens", kv_lens, 0, width * pages.page_size)
    t = xp.arange(tokens)
    owner = xp.clip(xp.searchsorted(starts, t, side="right") - 1, 0, seqs - 1)
    real = (t >= starts[0]) & (t < starts[-1])
    check.forbid("visible_lo", lo, real & (lo < 0), "not be negative")
    written = kv_lens[owner]
    check.forbid("visible_hi", hi, real & (hi > written), "be at most kv_len = {limit}", written)
    mine = (owner == xp.arange(seqs)[:, None]) & real & (lo < hi)  # [seqs, tokens]
    first = xp.where(mine, lo, width * pages.page_size).min(axis=1) // pages.page_size
    last = xp.where(mine, hi, 0).max(axis=1)
    place = xp.arange(width)
    used = (place >= first[:, None]) & (place * pages.page_size < last[:, None])
    check.within("block_tables", tables, 0, pages.num_pages - 1, used)


def check_shapes(
    q, pages: Pages, block_tables, query_starts, kv_lens, visible_lo, visible_hi,
    tail_mask, sinks, value_width: int | None,
) -> None:  # fmt: skip
    """Raises ValueError, with the values, if shapes or dtypes contradict each other."""
    if len(q.shape) != 3:
        raise ValueError(f"q must be [tokens, q_heads, k_width], got {q.shape=}")
    tokens, q_heads, k_width = q.shape
    if q_heads % pages.kv_heads:
        raise ValueError(f"{q_heads} query heads are not a multiple of {pages.kv_heads} KV heads")
    _check_widths(pages, k_width, value_width)
    if len(block_tables.shape) != 2:
        raise ValueError(f"block_tables must be [seqs, pages_per_seq], got {block_tables.shape=}")
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
    for name, x in (("block_tables", block_tables), ("query_starts", query_starts),
                    ("kv_lens", kv_lens), ("visible_lo", visible_lo),
                    ("visible_hi", visible_hi)):  # fmt: skip
        if x.dtype != np.int32:
            raise ValueError(f"{name} must be int32, got {x.dtype}")
    if tail_mask is not None and (
        len(tail_mask.shape) != 2 or tail_mask.shape[0] != tokens or tail_mask.dtype != np.uint32
    ):
        raise ValueError(
            f"tail_mask must be uint32[{tokens}, words], got {tail_mask.dtype}{tail_mask.shape}"
        )
    if sinks is not None and sinks.shape != (q_heads,):
        raise ValueError(f"expected one sink per query head ({q_heads}), got {sinks.shape=}")


def _check_widths(pages: Pages, k_width: int, value_width: int | None) -> None:
    if value_width is not None and not 0 < value_width <= k_width:
        raise ValueError(f"value_width must be in 1..{k_width}, got {value_width}")
    if isinstance(pages, LayerPages):
        if pages.k.shape[3] != k_width:
            raise ValueError(f"queries are {k_width} wide, keys {pages.k.shape[3]}")
        if (pages.v is None) != (value_width is not None):
            raise ValueError(
                f"value_width={value_width} but pages hold values: {pages.v is not None}"
            )
        return
    lanes = pages.kv.shape[3] // (1 if value_width is not None else 2)
    if k_width > lanes:
        raise ValueError(f"queries are {k_width} wide, packed keys have {lanes} lanes")
