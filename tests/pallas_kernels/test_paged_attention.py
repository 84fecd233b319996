"""The compiled backends against the float64 oracle, with NaN wherever nothing may be read."""

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.pallas_kernels import LayerPages, paged_attention
from tests.pallas_kernels.attention_cases import (
    BACKENDS,
    Heads,
    Seen,
    assert_matches_reference,
    attend,
    causal,
    problem,
)

SMOLLM2 = Heads(9, 3, 64)
SHAPES = [
    SMOLLM2,
    Heads(5, 5, 32),
    Heads(8, 4, 80),
    Heads(4, 2, 256),
    Heads(4, 1, 40, latent=32),
    Heads(9, 1, 64),
    Heads(8, 8, 64),
    Heads(8, 2, 128),
    Heads(7, 1, 128),
    Heads(4, 1, 576, latent=512),
]
LENGTHS = [  # nothing, one, around a page, and more than one tile of queries and block of keys
    (0, []),
    (1, causal(1, 1)),
    (15, causal(15, 15)),
    (16, causal(16, 1)),
    (17, causal(17, 2)),
    (330, causal(330, 70)),
    (300, causal(300, 1)),
]
WINDOWED = [(kv_len, causal(kv_len, len(seen), window=21)) for kv_len, seen in LENGTHS]
VARIANTS = {
    "plain": {"seqs": LENGTHS},
    "window": {"seqs": WINDOWED},
    "cap": {"seqs": LENGTHS, "soft_cap": 1.5},
    "sinks": {"seqs": WINDOWED, "sinks": True},
    "tail": {"seqs": LENGTHS, "tail_words": 2},
    "all": {"seqs": WINDOWED, "soft_cap": 4.0, "sinks": True, "tail_words": 1},
}
SLOW = pytest.mark.slow
NUM_TOKENS = 96  # of which 90 are real


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", SHAPES[:4], ids=str)
def test_head_shapes_match_the_oracle(backend, heads):
    assert_matches_reference(problem(1, heads, LENGTHS, num_tokens=NUM_TOKENS), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow
@pytest.mark.parametrize("heads", SHAPES[4:], ids=str)
@pytest.mark.parametrize("bfloat16", [False, True], ids=["f32", "bf16"])
def test_every_head_shape_matches_the_oracle(backend, heads, bfloat16):
    p = problem(1, heads, LENGTHS, num_tokens=NUM_TOKENS, bfloat16=bfloat16)
    assert_matches_reference(p, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [SHAPES[0], pytest.param(SHAPES[4], marks=SLOW)], ids=str)
def test_bfloat16_pages_match_the_oracle(backend, heads):
    p = problem(1, heads, LENGTHS, num_tokens=NUM_TOKENS, bfloat16=True)
    assert_matches_reference(p, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [SHAPES[0], SHAPES[4]], ids=str)
@pytest.mark.parametrize("physical", [np.int8, np.uint8], ids=["int8", "float8"])
def test_quantised_pages_match_the_oracle_on_what_they_hold(backend, heads, physical):
    p = problem(1, heads, LENGTHS, num_tokens=NUM_TOKENS, physical=physical, soft_cap=4.0)
    assert_matches_reference(p, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[SLOW] * (v in ("cap", "sinks", "tail"))) for v in VARIANTS]
)
def test_every_mask_and_score_variant_matches_the_oracle(backend, variant):
    assert_matches_reference(
        problem(2, SMOLLM2, num_tokens=NUM_TOKENS, **VARIANTS[variant]), backend=backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["plain", "all"])
def test_the_decode_body_matches_the_oracle(backend, variant):
    options = dict(VARIANTS[variant])
    options["seqs"] = [(n, seen[-1:] or [(0, 0)]) for n, seen in options["seqs"]]
    p = problem(3, SMOLLM2, num_tokens=16, **options)
    assert_matches_reference(p, max_query_len=1, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size", [pytest.param(1, marks=SLOW), 256])
def test_any_page_size_that_divides_a_block_works(backend, page_size):
    p = problem(
        4, SMOLLM2, LENGTHS, page_size=page_size, pages_per_seq=-(-330 // page_size),
        num_tokens=NUM_TOKENS,
    )  # fmt: skip
    assert_matches_reference(p, backend=backend)


@st.composite
def scattered(draw) -> list[tuple[int, list[Seen]]]:
    """Three sequences with any interval for any query: scattered recompute, blocks, prefixes."""
    edges = st.sampled_from([0, 1, 15, 16, 17, 255, 256, 257, 384]) | st.integers(0, 384)
    seqs = []
    for _ in range(3):
        kv_len = draw(edges)
        ends = st.sampled_from([0, min(1, kv_len), kv_len]) | st.integers(0, kv_len)
        seqs.append((kv_len, draw(st.lists(st.tuples(ends, ends), max_size=5))))
    return seqs


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30, deadline=None)
@given(scattered(), st.integers(0, 2**32 - 1), st.booleans())
def test_queries_may_see_any_interval_and_nobody_else_is_read(backend, seqs, seed, tail):
    p = problem(seed, Heads(4, 2, 32), seqs, num_tokens=16, tail_words=3 if tail else 0)
    assert_matches_reference(p, backend=backend)


@st.composite
def ragged(draw) -> dict[str, Any]:
    """Lengths around pages, any of their ends as queries, windows, ratios of heads, options."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (3, 3), (1, 9), (2, 7), (4, 1), (2, 4)]))
    latent = draw(st.sampled_from([None, 32])) if kv_heads == 1 else None
    width = draw(st.sampled_from([32, 64, 80, 128, 256])) if latent is None else 40
    window = draw(st.sampled_from([None, 1, 20]))
    seqs = []
    for _ in range(4):
        kv_len = draw(st.sampled_from([0, 1, 15, 16, 17, 31, 260]))
        queries = draw(st.integers(0, min(kv_len, 8)))
        seqs.append((kv_len, causal(kv_len, queries, window)))
    return {
        "heads": Heads(kv_heads * group, kv_heads, width, latent),
        "seqs": seqs,
        "physical": draw(st.sampled_from([np.float32, np.uint16, np.int8, np.uint8])),
        "tail_words": draw(st.integers(0, 2)),
        "sinks": draw(st.booleans()),
        "soft_cap": draw(st.sampled_from([None, 3.0])),
    }


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(ragged(), st.integers(0, 2**32 - 1))
def test_any_shape_dtype_and_option_matches_the_oracle(backend, drawn, seed):
    heads, seqs = drawn.pop("heads"), drawn.pop("seqs")
    assert_matches_reference(problem(seed, heads, seqs, num_tokens=32, **drawn), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_sees_nothing_gives_zeros_and_no_mass(backend):
    p = problem(5, SMOLLM2, [(40, [(7, 7), (20, 3), (0, 40)]), (0, [(0, 1)])])
    o, lse = attend(p, backend=backend)
    np.testing.assert_array_equal(o[[0, 1, 3]], 0)
    np.testing.assert_array_equal(lse[[0, 1, 3]], -np.inf)
    assert np.isfinite(lse[2]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_written_past_a_row_does_not_change_it(backend):
    """Queries in the middle of a sequence: a mask aligned to its end would see the future."""
    seqs = [(200, [(0, 31), (0, 32), (0, 90)])]
    p = problem(6, SMOLLM2, seqs)
    o, _ = attend(p, backend=backend)
    whole = problem(6, SMOLLM2, [(200, [(0, 200)])])
    filled = jax.tree.map(lambda a, b: np.where(np.isnan(a), b, a), p.pages, whole.pages)
    again, _ = attend(type(p)(**{**vars(p), "pages": filled}), backend=backend)
    np.testing.assert_array_equal(o, again)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_neither_overflow_nor_lose_the_row(backend):
    p = problem(7, SMOLLM2, [(300, causal(300, 3))])
    loud = type(p)(**{**vars(p), "q": p.q * 200})
    o, lse = attend(loud, backend=backend)
    want_o, want_lse = attend(loud, backend="reference")
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5)
    np.testing.assert_allclose(o, want_o, atol=2e-3)  # scores of 2000 hold 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_can_be_left_out_and_numpy_arguments_need_no_jit(backend):
    p = problem(8, SMOLLM2, LENGTHS, num_tokens=NUM_TOKENS)
    o = paged_attention(
        p.q, p.pages, p.block_tables, p.query_starts, p.kv_lens, p.lo, p.hi, scale=0.125,
        backend=backend,
    )  # fmt: skip
    np.testing.assert_array_equal(o, attend(p, backend=backend)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((90, 8, 64), np.float32)}, "not a multiple of 3"),
        ({"q": np.zeros((90, 9, 32), np.float32)}, "queries are 32 wide"),
        ({"value_width": 64}, "value_width=64"),
        ({"kv_lens": np.zeros(3, np.int32)}, "query starts"),
        ({"hi": np.zeros(4, np.int32)}, "expected 90 intervals"),
        ({"tail_mask": np.zeros((3, 1), np.uint32)}, "tail_mask"),
        ({"lo": np.zeros(90, np.float32)}, "visible_lo must be int32, got float32"),
        ({"q": np.zeros((90, 64), np.float32)}, r"q must be \[tokens"),
        ({"block_tables": np.zeros(7, np.int32)}, r"block_tables must be \[seqs"),
        ({"sinks": np.zeros(3, np.float32)}, "one sink per query head"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_contradicting_shapes_are_refused_with_the_values(backend, change, message):
    p = problem(9, SMOLLM2, LENGTHS)
    p = type(p)(**{**vars(p), **change})
    with pytest.raises(ValueError, match=message):
        attend(p, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_xla_backend_wants_pages_that_divide_its_block(backend):
    p = problem(10, SMOLLM2, [(5, causal(5, 1))], page_size=48)
    if backend == "cpu":
        assert_matches_reference(p, backend=backend)
    else:
        with pytest.raises(NotImplementedError, match="page_size=48"):
            attend(p, backend=backend)


def test_the_cpu_backend_refuses_pages_that_it_cannot_unpack():
    p = problem(11, SMOLLM2, [(5, causal(5, 1))])
    pages = jax.tree.map(lambda x: x.astype(np.float16), p.pages)
    with pytest.raises(NotImplementedError, match="pages are float16"):
        attend(type(p)(**{**vars(p), "pages": pages}), backend="cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_the_size_of_the_pool_is_made(backend):
    """Reading a block gathers pages; it never converts or copies the pool."""
    num_pages, width = 4096, 64
    pool = jax.ShapeDtypeStruct((num_pages, 3, 16, width), np.uint16)
    ints = {n: jax.ShapeDtypeStruct((n,), np.int32) for n in (8, 9)}

    def call(q, k, v, tables, starts, kv_lens, lo, hi):
        return paged_attention(
            q, LayerPages(k, v), tables, starts, kv_lens, lo, hi, scale=0.125, backend=backend
        )

    lowered = jax.jit(call).lower(
        jax.ShapeDtypeStruct((8, 9, width), np.float32), pool, pool,
        jax.ShapeDtypeStruct((8, 64), np.int32), ints[9], ints[8], ints[8], ints[8],
    )  # fmt: skip
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.5 * num_pages * 3 * 16 * width * 2
