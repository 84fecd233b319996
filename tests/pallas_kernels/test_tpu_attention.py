"""The Mosaic TPU bodies in interpret mode against the float64 oracle, NaN wherever nobody may read.

Two interpreters: `True` (as jax operations, quick, for shapes), and one that copies, waits and
looks for races as a TPU would (slow, for few of them).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kvjax.pallas_kernels import (
    OPERATIONS,
    attention_mass,
    compat,
    pack_pages,
    paged_attention,
    tuning,
)
from kvjax.pallas_kernels.paged_attention import tpu, tpu_decode, tpu_prefill, tpu_stream
from tests.pallas_kernels.attention_cases import Heads, Problem, attend, causal, problem

SMOLLM2 = Heads(9, 3, 64)
MIXED = [  # decode, a chunk, nothing to see, scattered queries, an empty sequence, a long decode
    (17, causal(17, 1)),
    (40, causal(40, 12, window=21)),
    (20, [(7, 7)]),
    (64, [(0, 11), (30, 33), (5, 64), (0, 0)]),
    (0, []),
    (300, causal(300, 1)),
]
DECODE = [(n, seen[-1:] or [(0, 0)]) for n, seen in MIXED]
SLOW = pytest.mark.slow
CASES = {
    "a mix, everything on": (
        problem(1, SMOLLM2, MIXED, num_tokens=24, tail_words=2, soft_cap=2.0, sinks=True), None
    ),
    "decode, everything on": (
        problem(2, SMOLLM2, DECODE, num_tokens=8, tail_words=2, soft_cap=2.0, sinks=True), 1
    ),
    "bfloat16, lanes apart": (problem(3, Heads(8, 2, 128), MIXED, bfloat16=True), None),
    "latent": (problem(4, Heads(4, 1, 40, latent=32), MIXED), None),
    "int8": (problem(5, Heads(4, 2, 64), MIXED, page_size=32, physical=np.int8), None),
    "float8, decode": (problem(6, Heads(4, 2, 64), DECODE, page_size=32, physical=np.uint8), 1),
    "int8, latent, decode": (
        problem(7, Heads(4, 1, 40, latent=32), DECODE, page_size=32, physical=np.int8), 1
    ),
}  # fmt: skip
LONG = {
    "head_dim 80": (problem(8, Heads(8, 4, 80), MIXED), None),
    "head_dim 256": (problem(9, Heads(4, 2, 256), MIXED), None),
    "more query heads than a product's rows": (problem(10, Heads(64, 1, 64), MIXED), None),
    "one query head per KV head": (problem(11, Heads(5, 5, 32), MIXED), None),
    "more tokens than a tile": (
        problem(12, Heads(4, 2, 32), [(300, causal(300, 140)), (200, causal(200, 150))]), None
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def short_blocks():
    """Few pages per block: quick to compile, and small problems have several blocks to wait for."""
    tuning.try_sizes("paged_attention/tpu_keys", {"keys": 48})
    tuning.try_sizes("paged_attention/tpu_prefill", {"tile": 16})
    yield
    tuning.try_sizes("paged_attention/tpu_keys", None)
    tuning.try_sizes("paged_attention/tpu_prefill", None)


def packed(p: Problem) -> Problem:
    """The same problem on packed pages, bits read as the numbers that they are."""

    def numbers(x):
        return x.view(ml_dtypes.bfloat16) if x.dtype == np.uint16 else x

    return dataclasses.replace(p, pages=pack_pages(jax.tree.map(numbers, p.pages)))


def run(p: Problem, max_query_len: int | None, interpret=True) -> tuple[np.ndarray, np.ndarray]:
    call = functools.partial(
        tpu.paged_attention, scale=p.q.shape[-1] ** -0.5, soft_cap=p.soft_cap,
        value_width=p.value_width, max_query_len=max_query_len, return_lse=True,
        interpret=interpret,
    )  # fmt: skip
    p = packed(p)
    quick = {"xla_backend_optimization_level": 0} if interpret is True else None
    o, lse = jax.jit(call, compiler_options=quick)(
        p.q, p.pages, p.block_tables, p.query_starts, p.kv_lens, p.lo, p.hi,
        tail_mask=p.tail_mask, sinks=p.sinks,
    )  # fmt: skip
    return np.asarray(o), np.asarray(lse)


def assert_matches(p: Problem, got: tuple[np.ndarray, np.ndarray]) -> None:
    tolerance = 1e-5 if p.pages.k.dtype == np.float32 else 2e-2
    (o, lse), n = got, p.num_tokens
    assert np.isfinite(o).all()
    want_o, want_lse = attend(p, backend="reference")
    np.testing.assert_allclose(o[:n], want_o[:n], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lse[:n], want_lse[:n], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=SLOW) for name in LONG)])
def test_the_bodies_match_the_oracle(name):
    p, max_query_len = (CASES | LONG)[name]
    assert_matches(p, run(p, max_query_len))


SMALL = [(33, causal(33, 1)), (20, [(20, 20)]), (20, causal(20, 3)), (40, [(0, 9), (20, 40)])]
SMALL_DECODE = [(n, seen[-1:]) for n, seen in SMALL]


def small(max_query_len: int | None) -> Problem:
    seqs = SMALL_DECODE if max_query_len == 1 else SMALL
    return problem(20, Heads(4, 2, 32), seqs, pages_per_seq=4, tail_words=1)


@pytest.mark.parametrize("mode", ["eager", "on_wait"])
@pytest.mark.parametrize("max_query_len", [1, pytest.param(None, marks=SLOW)], ids=str)
def test_nothing_races_whenever_copies_happen(max_query_len, mode):
    p = small(max_query_len)
    got = run(p, max_query_len, compat.tpu_interpreter(dma_execution_mode=mode))
    assert not compat.tpu_races()
    assert_matches(p, got)


class ForgetsToWait(tpu_stream.PageStream):
    def _wait(self, i, block, slot):
        del i, block, slot


class CopiesIntoTheBufferInUse(tpu_stream.PageStream):
    def _each_copy(self, i, block, slot, act):
        super()._each_copy(i, block, slot * 0, act)


BUGS = [ForgetsToWait, CopiesIntoTheBufferInUse]


@pytest.mark.parametrize("mode", ["eager", "on_wait"])
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
@pytest.mark.parametrize("max_query_len", [1, pytest.param(None, marks=SLOW)], ids=str)
def test_a_planted_bug_in_the_copies_is_caught(monkeypatch, max_query_len, bug, mode):
    monkeypatch.setattr(tpu_decode, "PageStream", bug)
    monkeypatch.setattr(tpu_prefill, "PageStream", bug)
    p = small(max_query_len)
    got = run(p, max_query_len, compat.tpu_interpreter(dma_execution_mode=mode))
    raced = compat.tpu_races()
    if bug is ForgetsToWait and mode == "eager":  # what was copied at once is right by luck
        assert raced
    else:
        with pytest.raises(AssertionError):
            assert_matches(p, got)


def test_only_visible_pages_are_read():
    """A window at the end of a long sequence: every page before it may be missing from the pool."""
    p = problem(21, Heads(4, 2, 32), [(300, causal(300, 1, window=20)), (64, [(17, 30)])])
    tables = np.array(p.block_tables)
    tables[0, :17] = tables[1, :1] = tables[1, 2:] = 10**6
    got = run(dataclasses.replace(p, block_tables=tables), 1, compat.tpu_interpreter())
    assert not compat.tpu_races()
    assert_matches(p, got)


@pytest.mark.parametrize("name", CASES)
def test_xla_gives_packed_pages_the_bits_of_split_ones(name):
    p, max_query_len = CASES[name]
    same = dataclasses.replace(p, pages=pack_pages(p.pages))
    got = attend(same, backend="xla", max_query_len=max_query_len)
    assert_matches(p, got)
    for a, b in zip(got, attend(p, backend="xla", max_query_len=max_query_len), strict=True):
        np.testing.assert_array_equal(a, b)


def test_attention_mass_of_packed_pages_is_that_of_split_ones():
    p, _ = CASES["int8"]
    _, lse = attend(p, backend="reference")

    def mass(p):
        return attention_mass(
            p.q, jnp.asarray(lse), p.pages, p.block_tables, p.query_starts, p.kv_lens, p.lo,
            p.hi, scale=0.125, backend="xla",
        )  # fmt: skip

    np.testing.assert_allclose(mass(packed(p)).columns, mass(p).columns, rtol=1e-5, atol=1e-6)


def test_refusals_say_why():
    p = problem(22, Heads(4, 2, 32), [(5, causal(5, 1))])

    def call(pages, tables=p.block_tables):
        return tpu.paged_attention(
            p.q, pages, tables, p.query_starts, p.kv_lens, p.lo, p.hi, scale=1.0, interpret=True
        )

    with pytest.raises(NotImplementedError, match="pages are split"):
        call(p.pages)
    with pytest.raises(NotImplementedError, match="page_size=16 of int8"):
        call(pack_pages(problem(22, Heads(4, 2, 32), [], physical=np.int8).pages))
    with pytest.raises(NotImplementedError, match="float16"):
        call(jax.tree.map(lambda x: x.astype(np.float16), pack_pages(p.pages)))
    with pytest.raises(NotImplementedError, match="scalar memory"):
        call(pack_pages(p.pages), np.zeros((1, 200_000), np.int32))


def test_the_dispatcher_knows_the_kernels_and_refuses_them_on_a_cpu():
    assert OPERATIONS["paged_attention"].order("tpu")[0] == "tpu"
    assert OPERATIONS["paged_attention"].explain("tpu")["tpu"] == "tpu: the platform is cpu"
    p = packed(problem(23, Heads(4, 2, 32), [(5, causal(5, 1))]))
    with pytest.raises(NotImplementedError, match="the platform is cpu"):
        paged_attention(
            p.q, p.pages, p.block_tables, p.query_starts, p.kv_lens, p.lo, p.hi, scale=1.0,
            backend="tpu",
        )  # fmt: skip
