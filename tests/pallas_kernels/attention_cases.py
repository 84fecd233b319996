"""Paged-attention problems whose every unreadable slot is NaN, and how results are compared."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from kvjax.pallas_kernels import LayerPages, paged_attention
from kvjax.pallas_kernels.page_ops.reference import encode
from kvjax.pallas_kernels.paged_attention import cpu

Seen = tuple[int, int]  # [lo, hi) of one query token


@dataclasses.dataclass(frozen=True)
class Heads:
    """Head counts and widths; `latent` values are the leading channels of the keys."""

    q: int
    kv: int
    width: int
    latent: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Arguments of one `paged_attention` call, on the host."""

    q: Any
    pages: LayerPages
    block_tables: Any
    query_starts: Any
    kv_lens: Any
    lo: Any
    hi: Any
    tail_mask: Any | None = None
    sinks: Any | None = None
    soft_cap: float | None = None
    value_width: int | None = None

    @property
    def num_tokens(self) -> int:
        """Query tokens without padding."""
        return int(self.query_starts[-1])

    def alone(self, rows: Sequence[int]) -> "Problem":
        """The chosen query rows, each as a sequence of one token, in this order."""
        rows = list(rows)
        owner = np.searchsorted(self.query_starts, rows, side="right") - 1
        return dataclasses.replace(
            self,
            q=self.q[rows],
            block_tables=self.block_tables[owner],
            query_starts=np.arange(len(rows) + 1, dtype=np.int32),
            kv_lens=self.kv_lens[owner],
            lo=self.lo[rows],
            hi=self.hi[rows],
            tail_mask=None if self.tail_mask is None else self.tail_mask[rows],
        )


def causal(kv_len: int, num_queries: int, window: int | None = None) -> list[Seen]:
    """The last `num_queries` indices of a sequence, each seeing itself and what is before it."""
    indices = range(kv_len - num_queries, kv_len)
    return [(max(0, i + 1 - window) if window else 0, i + 1) for i in indices]


def problem(
    seed: int,
    heads: Heads,
    seqs: Sequence[tuple[int, Sequence[Seen]]],
    *,
    page_size: int = 16,
    pages_per_seq: int = 24,
    num_tokens: int | None = None,
    bfloat16: bool = False,
    physical: Any = None,
    tail_words: int = 0,
    sinks: bool = False,
    soft_cap: float | None = None,
) -> Problem:
    """Sequences `(kv_len, interval of each query token)` over permuted pages.

    Only slots that some row of their sequence may see hold numbers: the rest of the pool (pages
    outside the tables, slots past `kv_len`, below every window, between the intervals, or shut out
    by every row's tail mask) is NaN. Padding tokens have ordinary queries and wild intervals.
    `physical` is the dtype of the page arrays, float32 unless `bfloat16`; int8 and uint8 (float8)
    pages hold NaN as the scale.
    """
    rng = np.random.default_rng(seed)
    num_pages = len(seqs) * pages_per_seq + 3
    tables = rng.permutation(num_pages)[: len(seqs) * pages_per_seq]
    tables = tables.reshape(len(seqs), pages_per_seq).astype(np.int32)
    seen = [interval for _, intervals in seqs for interval in intervals]
    padding = 0 if num_tokens is None else num_tokens - len(seen)
    assert padding >= 0
    starts = np.cumsum([0, *(len(intervals) for _, intervals in seqs)]).astype(np.int32)
    lo, hi = np.array([*seen, *[(0, 10**6)] * padding], np.int32).reshape(-1, 2).T

    tail = rng.integers(0, 2**32, (len(lo), tail_words), dtype=np.uint32)
    if tail_words:
        tail[:, 0] &= ~np.uint32(1 << 7)  # an index that no row sees
    readable = np.zeros((num_pages, page_size), bool)
    for s, (kv_len, intervals) in enumerate(seqs):
        for t, (first, last) in enumerate(intervals, start=starts[s]):
            index = np.arange(first, min(last, kv_len))
            bit = index - (kv_len - 32 * tail_words)
            bits = np.unpackbits(tail[t].view(np.uint8), bitorder="little")
            index = index[(bit < 0) | np.append(bits, 1)[np.maximum(bit, 0)].astype(bool)]
            readable[tables[s, index // page_size], index % page_size] = True

    physical = np.dtype(physical or (np.uint16 if bfloat16 else np.float32))

    def pool(width: int) -> Any:
        numbers = rng.standard_normal((num_pages, heads.kv, page_size, width))
        return encode(np.where(readable[:, None, :, None], numbers, np.nan), physical)

    k, k_scale = pool(heads.width)
    v, v_scale = (None, None) if heads.latent else pool(heads.width)
    q = rng.standard_normal((len(lo), heads.q, heads.width)).astype(np.float32)
    return Problem(
        q=q.astype(ml_dtypes.bfloat16).astype(np.float32) if bfloat16 else q,
        pages=LayerPages(k, v, k_scale, v_scale),
        block_tables=tables,
        query_starts=starts,
        kv_lens=np.array([kv_len for kv_len, _ in seqs], np.int32),
        lo=lo,
        hi=hi,
        tail_mask=tail if tail_words else None,
        sinks=rng.standard_normal(heads.q).astype(np.float32) * 2 if sinks else None,
        soft_cap=soft_cap,
        value_width=heads.latent,
    )


try:
    cpu.probe()
    _refusal = None
except NotImplementedError as why:
    _refusal = why
COMPILED = ("cpu", "xla")
BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(_refusal is not None, reason=str(_refusal))),
    "xla",
]
_compiled: dict[object, Callable] = {}


def attend(
    p: Problem, *, backend: str, max_query_len: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Output and lse of every row; the backends in `COMPILED` run under jit."""
    static = (p.soft_cap, p.value_width, max_query_len, backend)

    def call(q, pages, tables, starts, kv_lens, lo, hi, tail_mask, sinks):
        return paged_attention(
            q, pages, tables, starts, kv_lens, lo, hi,
            scale=q.shape[-1] ** -0.5, tail_mask=tail_mask, sinks=sinks, soft_cap=p.soft_cap,
            value_width=p.value_width, max_query_len=max_query_len, return_lse=True,
            backend=backend,
        )  # fmt: skip

    run = _compiled.setdefault(static, jax.jit(call)) if backend in COMPILED else call
    o, lse = run(
        p.q, p.pages, p.block_tables, p.query_starts, p.kv_lens, p.lo, p.hi, p.tail_mask, p.sinks
    )
    return np.asarray(o), np.asarray(lse)


def assert_matches_reference(p: Problem, *, backend: str, max_query_len: int | None = None) -> None:
    """Real rows within 1e-5 (bfloat16: 1e-2) of the float64 oracle, padding rows finite."""
    tolerance = 1e-2 if p.pages.k.dtype == np.uint16 else 1e-5
    o, lse = attend(p, backend=backend, max_query_len=max_query_len)
    want_o, want_lse = attend(p, backend="reference")
    n = p.num_tokens
    assert np.isfinite(o).all()
    # relative to the values, which are standard normal: an output is a mean of them
    np.testing.assert_allclose(o[:n], want_o[:n], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lse[:n], want_lse[:n], rtol=tolerance, atol=tolerance)
