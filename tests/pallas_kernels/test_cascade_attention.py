"""Cascades over shared prefixes: equal to plain attention, and cheaper by the rule that says so."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvjax.pallas_kernels
from kvjax.pallas_kernels.cascade_attention import reference
from tests.pallas_kernels.attention_cases import (
    BACKENDS,
    Heads,
    Problem,
    Seen,
    causal,
    problem,
)

cascade_attention: Any = kvjax.pallas_kernels.cascade_attention  # takes numpy too
HEADS = Heads(4, 2, 32)
_compiled: dict[Any, Any] = {}


def shared(p: Problem, groups: list[int], prefixes: list[int]) -> tuple[Problem, Any, Any]:
    """The problem with each group's first `prefix` indices on the pages of its first sequence.

    The partial page at the end of a prefix is copied, as copy-on-write does; its other slots, and
    what no row may see, stay NaN.
    """
    size, tables = p.pages.page_size, p.block_tables.copy()
    pages = jax.tree.map(np.copy, p.pages)
    starts = np.cumsum([0, *groups]).astype(np.int32)
    for first, last, prefix in zip(starts[:-1], starts[1:], prefixes, strict=True):
        whole, rest = divmod(prefix, size)
        for s in range(first + 1, last):
            tables[s, :whole] = tables[first, :whole]
            if rest:
                for pool in jax.tree.leaves(pages):
                    pool[tables[s, whole], :, :rest] = pool[tables[first, whole], :, :rest]
    return (
        dataclasses.replace(p, pages=pages, block_tables=tables),
        starts,
        np.array(prefixes, np.int32),
    )


def filled(p: Problem, prefixes: dict[int, int]) -> Problem:
    """The first `prefix` slots of sequence `s` hold numbers, whoever of its own rows sees them."""
    pages = jax.tree.map(np.copy, p.pages)
    rng = np.random.default_rng(99)
    for s, prefix in prefixes.items():
        for pool in jax.tree.leaves(pages):
            for i in range(prefix):
                row = pool[p.block_tables[s, i // pages.page_size], :, i % pages.page_size]
                row[...] = rng.standard_normal(row.shape)
    return dataclasses.replace(p, pages=pages)


def attend(p: Problem, starts, prefix_lens, *, backend: str, **options) -> Any:
    def call(q, pages, tables, query_starts, kv_lens, lo, hi, tail_mask, sinks, starts, lens):
        return cascade_attention(
            q, pages, tables, query_starts, kv_lens, lo, hi, group_starts=starts,
            prefix_lens=lens, scale=q.shape[-1] ** -0.5, tail_mask=tail_mask, sinks=sinks,
            soft_cap=p.soft_cap, value_width=p.value_width, return_lse=True, backend=backend,
            **options,
        )  # fmt: skip

    key = (p.soft_cap, p.value_width, backend, *options.items())
    run = _compiled.setdefault(key, jax.jit(call))
    return run(
        p.q, p.pages, p.block_tables, p.query_starts, p.kv_lens, p.lo, p.hi, p.tail_mask,
        p.sinks, starts, prefix_lens,
    )  # fmt: skip


def assert_equals_plain_attention(p: Problem, starts, lens, *, backend: str, **options) -> None:
    want = reference.cascade_attention(
        p.q, p.pages, p.block_tables, p.query_starts, p.kv_lens, p.lo, p.hi, group_starts=starts,
        prefix_lens=lens, scale=p.q.shape[-1] ** -0.5, tail_mask=p.tail_mask, sinks=p.sinks,
        soft_cap=p.soft_cap, value_width=p.value_width, return_lse=True,
    )  # fmt: skip
    got = attend(p, starts, lens, backend=backend, **options)
    tolerance, n = (1e-2 if p.pages.k.dtype == np.uint16 else 1e-5), p.num_tokens
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a[:n], b[:n], rtol=tolerance, atol=tolerance)
    assert np.isfinite(got[0]).all()


@st.composite
def grouped(draw) -> tuple[list[tuple[int, list[Seen]]], list[int], list[int]]:
    """Sequences with any intervals, cut into groups with any common prefix, empty groups too."""
    groups = draw(st.sampled_from([[3], [1, 2], [2, 0, 1], [1, 1, 1]]))
    seqs, prefixes = [], []
    for members in groups:
        prefix = draw(st.sampled_from([0, 1, 15, 16, 17, 256, 300]) | st.integers(0, 300))
        prefixes.append(prefix)
        for _ in range(members):
            kv_len = prefix + draw(st.sampled_from([0, 1, 16, 40]))
            ends = st.sampled_from([0, prefix, kv_len]) | st.integers(0, kv_len)
            seqs.append((kv_len, draw(st.lists(st.tuples(ends, ends), max_size=3))))
    return seqs, groups + [0] * (3 - len(groups)), prefixes + [0] * (3 - len(groups))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30, deadline=None)
@given(grouped(), st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_any_groups_with_any_intervals_equal_plain_attention(backend, case, seed, tail, sinks):
    seqs, groups, prefixes = case
    p = problem(seed, HEADS, seqs, num_tokens=12, tail_words=2 if tail else 0, sinks=sinks)
    firsts = np.cumsum([0, *groups])[:-1]
    p = filled(p, {int(s): n for s, n, m in zip(firsts, prefixes, groups, strict=True) if m})
    assert_equals_plain_attention(*shared(p, groups, prefixes), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [Heads(9, 3, 64), Heads(4, 1, 40, latent=32)], ids=str)
@pytest.mark.parametrize("bfloat16", [False, True], ids=["f32", "bf16"])
def test_decode_of_a_group_equals_plain_attention(backend, heads, bfloat16):
    seqs = [(n, causal(n, 1)) for n in (301, 310, 333)] + [(40, causal(40, 1))]
    p = problem(1, heads, seqs, num_tokens=6, bfloat16=bfloat16, soft_cap=3.0)
    assert_equals_plain_attention(*shared(p, [3, 1], [300, 0]), backend=backend, max_query_len=1)


def test_the_prefix_pass_reads_the_first_members_pages():
    """The others' entries of whole prefix pages are never looked at: here they point nowhere."""
    seqs = [(n, causal(n, 1)) for n in (301, 310, 333)]
    p, starts, lens = shared(problem(2, HEADS, seqs), [3], [300])
    blind = p.block_tables.copy()
    blind[1:, :16] = 0  # a whole block of 256 keys, so that no backend loads it beside others
    q = dataclasses.replace(p, block_tables=blind)
    for a, b in zip(
        attend(p, starts, lens, backend="xla"), attend(q, starts, lens, backend="xla"), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def ignores_the_tail(p: Problem, starts, lens):
    """A planted bug: the split ignores that the mask reaches into the prefix."""
    return attend(dataclasses.replace(p, tail_mask=None), starts, lens, backend="xla")


def counts_the_prefix_twice(p: Problem, starts, lens):
    """A planted bug: the members' own pass starts at the front."""
    longer = attend(p, starts, lens, backend="xla")
    shorter = attend(p, starts, lens * 0, backend="xla")
    both = np.logaddexp(longer[1], shorter[1])
    return shorter[0], both


def takes_one_index_too_many(p: Problem, starts, lens):
    """A planted bug: the prefix reaches into what only the first member wrote."""
    return attend(p, starts, lens + 1, backend="xla")


@pytest.mark.parametrize(
    "bug", [ignores_the_tail, counts_the_prefix_twice, takes_one_index_too_many]
)
def test_a_planted_bug_is_caught(bug):
    seqs = [(n, causal(n, 1)) for n in (41, 50, 63)]
    masked = problem(3, HEADS, seqs, tail_words=1 if bug is ignores_the_tail else 0)
    p, starts, lens = shared(filled(masked, {0: 40}), [3], [40])
    want = attend(p, starts, lens, backend="xla")
    assert_equals_plain_attention(p, starts, lens, backend="xla")
    wrong = bug(p, starts, lens)
    assert any(not np.allclose(a, b, atol=1e-3) for a, b in zip(wrong, want, strict=True))


@pytest.mark.parametrize("starts", [[0, 3], [0, 1, 2, 3]])
def test_groups_that_do_not_fit_their_prefixes_are_refused(starts):
    p = problem(4, HEADS, [(40, causal(40, 1))] * 3)
    with pytest.raises(ValueError, match=r"group_starts\.shape"):
        cascade_attention(
            p.q, p.pages, p.block_tables, p.query_starts, p.kv_lens, p.lo, p.hi,
            group_starts=np.array(starts, np.int32), prefix_lens=np.zeros(2, np.int32), scale=1.0,
        )  # fmt: skip
