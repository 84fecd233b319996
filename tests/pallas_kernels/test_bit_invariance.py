"""A row's bits depend on the row: not on its batch, its chunk, its tile or the body that ran it."""

import dataclasses

import numpy as np
import pytest

from tests.pallas_kernels.attention_cases import (
    BACKENDS,
    Heads,
    Problem,
    Seen,
    attend,
    causal,
    problem,
)

SEQS = [(330, causal(330, 70)), (300, causal(300, 1)), (40, causal(40, 9)), (5, [])]
NUM_TOKENS = 84  # of which 80 are real
ALL_SHAPES = [
    Heads(9, 3, 64),
    Heads(7, 1, 128),
    Heads(8, 8, 64),
    Heads(8, 2, 128),
    Heads(4, 4, 32),
    Heads(8, 4, 80),
    Heads(4, 2, 256),
    Heads(4, 1, 40, latent=32),
    Heads(4, 1, 576, latent=512),
]
VARIANTS = {
    "cap": {"soft_cap": 3.0},
    "sinks": {"sinks": True},
    "tail": {"tail_words": 2},
}


def assert_same_rows_alone(
    p: Problem, backend: str, batches: tuple[int, ...], rows: list[int]
) -> None:
    """Each row of `rows` has the bits of the mixed call when decoded in batches of any size."""
    o, lse = attend(p, backend=backend)
    for batch in batches:
        for i in range(0, len(rows), batch):
            picked = [rows[j % len(rows)] for j in range(i, i + batch)]
            o_alone, lse_alone = attend(p.alone(picked), max_query_len=1, backend=backend)
            np.testing.assert_array_equal(o_alone, o[picked], err_msg=f"{batch=} {picked=}")
            np.testing.assert_array_equal(lse_alone, lse[picked], err_msg=f"{batch=} {picked=}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "bfloat16"), [(ALL_SHAPES[0], True), (ALL_SHAPES[1], False)])
def test_a_row_decodes_to_the_bits_of_its_prefill(backend, heads, bfloat16):
    p = problem(1, heads, SEQS, num_tokens=NUM_TOKENS, bfloat16=bfloat16)
    assert_same_rows_alone(p, backend, (1, 8), list(range(p.num_tokens)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow
@pytest.mark.parametrize("bfloat16", [False, True], ids=["f32", "bf16"])
@pytest.mark.parametrize("heads", ALL_SHAPES, ids=str)
def test_a_row_decodes_to_the_bits_of_its_prefill_in_any_batch(backend, heads, bfloat16):
    p = problem(2, heads, SEQS, num_tokens=NUM_TOKENS, bfloat16=bfloat16)
    assert_same_rows_alone(p, backend, (1, 2, 3, 4, 8), list(range(p.num_tokens)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_masks_and_score_functions_keep_the_bits(backend, variant):
    p = problem(3, ALL_SHAPES[1], SEQS, num_tokens=NUM_TOKENS, **VARIANTS[variant])
    assert_same_rows_alone(p, backend, (1, 8), list(range(p.num_tokens)))


def chunk(p: Problem, first: int, last: int) -> Problem:
    """Query rows `[first, last)` of the first sequence as the whole batch, padded to as many."""
    size = len(p.q)

    def rows(x):
        return np.resize(x[first:last], (size, *x.shape[1:]))

    starts = np.full_like(p.query_starts, last - first)
    starts[0] = 0
    return dataclasses.replace(p, q=rows(p.q), lo=rows(p.lo), hi=rows(p.hi), query_starts=starts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_may_start_anywhere(backend):
    p = problem(4, Heads(9, 3, 64), SEQS, num_tokens=NUM_TOKENS)
    o, lse = attend(p, backend=backend)
    for first, last in ((0, 2), (3, 70), (64, 70), (5, 69), (69, 70)):
        part, part_lse = attend(chunk(p, first, last), backend=backend)
        np.testing.assert_array_equal(part[: last - first], o[first:last])
        np.testing.assert_array_equal(part_lse[: last - first], lse[first:last])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tile_may_be_as_small_as_the_batch(backend):
    p = problem(5, Heads(8, 8, 64), SEQS, num_tokens=NUM_TOKENS)
    o, _ = attend(p, backend=backend)
    for first, size in ((0, 2), (30, 3)):
        small = dataclasses.replace(
            chunk(p, first, first + size),
            q=p.q[first : first + size],
            lo=p.lo[first : first + size],
            hi=p.hi[first : first + size],
        )
        np.testing.assert_array_equal(attend(small, backend=backend)[0], o[first : first + size])


def sharing(p: Problem, members: list[tuple[int, int]], own: list[Seen]) -> Problem:
    """Sequences of `p` (kv_len 400 each) whose first pages are those of an earlier sequence.

    `members[s]` is that sequence and how many pages; `own[s]` is what the single row of `s` sees.
    """
    tables = p.block_tables.copy()
    for s, (leader, pages) in enumerate(members):
        tables[s, :pages] = tables[leader, :pages]
    lo, hi = np.array(own, np.int32).T
    return dataclasses.replace(p, block_tables=tables, lo=lo, hi=hi, kv_lens=np.maximum(hi, 1))


KINDS = {"f32": np.float32, "bf16": np.uint16, "int8": np.int8}
MEMBERS = [(0, 20), (1, 21), (0, 20), (0, 7), (1, 21), (5, 3), (0, 20), (1, 3), (0, 20), (0, 20)]
OWN = [(0, 400), (0, 361), (0, 333), (0, 130), (200, 380), (0, 17), (64, 400), (0, 0), (300, 321),
       (0, 320)]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", [*KINDS, *VARIANTS])
def test_sequences_that_share_pages_give_the_bits_of_each_alone(backend, variant):
    """Interleaved groups, prefixes inside of blocks, windows that begin within the prefix."""
    heads = Heads(9, 3, 64)
    seqs = [(400, [(0, 400)])] * len(OWN)
    options = VARIANTS.get(variant) or {"physical": KINDS[variant]}
    p = sharing(problem(6, heads, seqs, pages_per_seq=25, **options), MEMBERS, OWN)
    o, lse = attend(p, backend=backend, max_query_len=1)
    for i in range(len(OWN)):
        o_alone, lse_alone = attend(p.alone([i]), backend=backend, max_query_len=1)
        np.testing.assert_array_equal(o_alone[0], o[i])
        np.testing.assert_array_equal(lse_alone[0], lse[i])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_one_sequence_appends_to_a_shared_prefix_reaches_no_other(backend):
    """NaN in the keys that only it sees, in the block in which the prefix ends and behind it."""
    seqs = [(400, [(0, 400)])] * 5
    p = problem(7, Heads(4, 2, 64), seqs, pages_per_seq=25)
    p = sharing(p, [(0, 18)] * 5, [(0, 400)] * 5)
    clean = attend(p, backend=backend, max_query_len=1)
    for pool in (p.pages.k, p.pages.v):
        assert pool is not None
        pool[p.block_tables[2, 18:]] = np.nan
    dirty = attend(p, backend=backend, max_query_len=1)
    assert np.isnan(dirty[0][2]).all()
    for i in (0, 1, 3, 4):
        np.testing.assert_array_equal(dirty[0][i], clean[0][i])
        np.testing.assert_array_equal(dirty[1][i], clean[1][i])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_of_a_few_tokens_share_too(backend):
    """Drafted tokens of several sequences on one prefix, beside a prefill on the same pages."""
    seqs = [(n, causal(n, k)) for n, k in ((400, 3), (399, 2), (370, 70), (350, 1))]
    p = problem(8, Heads(9, 3, 64), [(400, [(0, 400)])] * 4, pages_per_seq=25)
    tables = p.block_tables.copy()
    tables[1:, :19] = tables[0, :19]
    p = dataclasses.replace(
        problem(8, Heads(9, 3, 64), seqs, pages_per_seq=25), pages=p.pages, block_tables=tables
    )
    o, lse = attend(p, backend=backend)
    for i in range(0, p.num_tokens, 5):
        o_alone, lse_alone = attend(p.alone([i]), backend=backend, max_query_len=1)
        np.testing.assert_array_equal(o_alone[0], o[i])
        np.testing.assert_array_equal(lse_alone[0], lse[i])
