"""Writes, gathers and copies of pages: equal to the specification, and in place when donated."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvjax.pallas_kernels as kernels
from kvjax.pallas_kernels import OPERATIONS, LayerPages, Pages, pack_pages, split_pages
from kvjax.pallas_kernels.page_ops import packed_width, quantise, xla
from kvjax.pallas_kernels.page_ops.reference import decode, encode

copy_pages: Any = kernels.copy_pages  # they take numpy too
export_span: Any = kernels.export_span
gather_slots: Any = kernels.gather_slots
import_span: Any = kernels.import_span
write_slots: Any = kernels.write_slots
PAGES, SIZE, HEADS = 6, 4, 3
TOKENS = 8
KINDS = {
    "f32": np.float32,
    "bf16 as uint16": np.uint16,
    "bf16": jnp.bfloat16,
    "int8": np.int8,
    "float8 as uint8": np.uint8,
    "float8": jnp.float8_e4m3fn,
}

jit_write = jax.jit(write_slots, static_argnames="backend")
jit_gather = jax.jit(gather_slots, static_argnames="widths")
jit_copy = jax.jit(copy_pages)
jit_export = jax.jit(export_span, static_argnames="widths")
jit_import = jax.jit(import_span)


def random_pages(seed: int, dtype: Any = np.float32, latent: bool = False) -> Any:
    rng = np.random.default_rng(seed)

    def pool(width) -> Any:
        numbers = rng.standard_normal((PAGES, HEADS, SIZE, width)) * 3
        return encode(numbers, np.dtype(dtype))

    k, k_scale = pool(8)
    v, v_scale = (None, None) if latent else pool(6)
    return LayerPages(k, v, k_scale, v_scale)


def random_tokens(seed: int, latent: bool = False) -> Any:
    rng = np.random.default_rng(seed)
    k = rng.standard_normal((TOKENS, HEADS, 8)).astype(np.float32)
    v = rng.standard_normal((TOKENS, HEADS, 6)).astype(np.float32)
    return k, None if latent else v


def assert_same_pages(a: Pages, b: Pages) -> None:
    """Equal bit for bit, NaN included."""
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            assert np.asarray(x).dtype == np.asarray(y).dtype
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


slots_of_distinct_tokens = (
    st.lists(st.integers(0, PAGES * SIZE - 1), max_size=TOKENS, unique=True)
    .map(lambda slots: [*slots, *[-1] * (TOKENS - len(slots))])
    .flatmap(st.permutations)
    .map(lambda slots: jnp.array(slots, jnp.int32))
)


@settings(max_examples=25, deadline=None)
@given(slots_of_distinct_tokens, st.sampled_from(list(KINDS)), st.booleans())
def test_writes_hit_their_slots_and_no_other(slots, kind, latent):
    pages = random_pages(1, KINDS[kind], latent)
    k, v = random_tokens(2, latent)
    assert_same_pages(
        jit_write(pages, k, v, slots), write_slots(pages, k, v, slots, backend="reference")
    )


def keeps_padding(pages, k, v, slots):
    """A planted bug: -1 wraps around to the last slot."""
    return xla.write_slots(pages, k, v, jnp.where(slots < 0, PAGES * SIZE - 1, slots))


def test_padding_that_is_not_dropped_is_caught():
    operation = OPERATIONS["page_ops.write_slots"]
    operation.register("keeps_padding", keeps_padding)
    try:
        pages, (k, v) = random_pages(1), random_tokens(2)
        slots = jnp.array([3, 5, -1, 7, -1, -1, -1, -1], jnp.int32)
        want = write_slots(pages, k, v, slots, backend="reference")
        assert_same_pages(jit_write(pages, k, v, slots), want)
        with pytest.raises(AssertionError):
            assert_same_pages(jit_write(pages, k, v, slots, backend="keeps_padding"), want)
    finally:
        del operation.implementations["keeps_padding"]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(-1, PAGES * SIZE - 1), min_size=TOKENS, max_size=TOKENS),
    st.sampled_from(list(KINDS)),
    st.booleans(),
)
def test_gathered_slots_are_what_is_stored_and_padding_is_zero(slots, kind, latent):
    pages, slots = random_pages(3, KINDS[kind], latent), jnp.array(slots, jnp.int32)
    got = jit_gather(pages, slots)
    for x, y in zip(got, gather_slots(pages, slots, backend="reference"), strict=True):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            x = np.asarray(x).astype(np.float64)  # a product with a scale is rounded to float32
            np.testing.assert_allclose(x, y, rtol=1e-7 if pages.quantised else 0)


def test_padding_gathers_zeros_from_a_pool_of_nan():
    pages = jax.tree.map(lambda pool: np.full_like(pool, np.nan), random_pages(3))
    k, v = jit_gather(pages, jnp.full(TOKENS, -1, jnp.int32))
    assert not np.asarray(k).any()
    assert not np.asarray(v).any()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, PAGES - 1), min_size=4, max_size=4),
    st.permutations(range(PAGES)).map(lambda pages: pages[:4]),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.sampled_from(list(KINDS)),
)
def test_copies_read_every_source_before_any_write(src, dst, kept, kind):
    pages = random_pages(4, KINDS[kind])
    src = jnp.array(src, jnp.int32)
    dst = jnp.array(np.where(kept, dst, -1), jnp.int32)
    assert_same_pages(jit_copy(pages, src, dst), copy_pages(pages, src, dst, backend="reference"))


@settings(max_examples=25, deadline=None)
@given(slots_of_distinct_tokens, st.sampled_from(list(KINDS)), st.booleans(), st.booleans())
def test_a_span_comes_back_bit_for_bit_in_either_layout(slots, kind, latent, packed):
    """Exported from one pool, imported into another: stored numbers and scales are equal."""
    pages, other = (random_pages(seed, KINDS[kind], latent) for seed in (1, 2))
    widths = (8, None if latent else 6)
    source = pack_pages(pages) if packed else pages
    span = jit_export(source, slots, widths=widths)
    want = export_span(pages, slots, backend="reference")
    for x, y in zip(jax.tree.leaves(span), jax.tree.leaves(want), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    target = pack_pages(other) if packed else other
    stored = jit_import(target, span, slots)
    if packed:
        stored = split_pages(stored, *widths)
    assert_same_pages(stored, import_span(other, want, slots, backend="reference"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("latent", [False, True])
def test_packed_pages_hold_what_split_pages_hold(kind, latent):
    pages, (k, v) = random_pages(1, KINDS[kind], latent), random_tokens(2, latent)
    widths, slots = (8, None if latent else 6), jnp.array([3, 7, -1, 0, 23, 9, -1, 8], jnp.int32)
    packed = jit_write(pack_pages(pages), k, v, slots)
    assert packed.kv.shape[3] == packed_width(*widths) == 128
    want: Any = write_slots(pages, k, v, slots, backend="reference")
    assert_same_pages(split_pages(packed, *widths), want)
    for x, y in zip(
        jax.tree.leaves(jit_gather(packed, slots, widths=widths)),
        jax.tree.leaves(jit_gather(want, slots)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from([np.int8, np.uint8]),
    st.integers(0, 2**32 - 1),
    st.floats(-38, 37).map(lambda e: 10.0**e),
)
def test_a_quantised_row_is_half_a_step_from_its_numbers(dtype, seed, magnitude):
    """int8: half of 1/127 of the largest; float8: 2**-4 of each, or half of its smallest step."""
    x = np.random.default_rng(seed).standard_normal((4, 16)) * magnitude
    x = x.astype(np.float32)
    stored, scale = encode(x, np.dtype(dtype))
    got = decode(stored, scale)
    assert scale is not None
    half_a_step = 0.5 if dtype == np.int8 else np.maximum(np.abs(x) / scale[:, None] / 16, 2**-10)
    assert (np.abs(got - x) <= 1.001 * half_a_step * scale[:, None]).all()
    ours, our_scale = jax.jit(quantise.quantise, static_argnums=1)(x, np.dtype(dtype))
    np.testing.assert_array_equal(ours, stored)
    np.testing.assert_array_equal(our_scale, scale)


def test_a_row_of_zeros_and_a_row_with_nan_stay_what_they_are():
    pages = random_pages(9, np.int8)
    k, v = random_tokens(10)
    k[0], k[1, 0, 3] = 0, np.nan
    k = jit_gather(jit_write(pages, k, v, np.arange(8, dtype=np.int32)), np.arange(2))[0]
    np.testing.assert_array_equal(np.asarray(k)[0], 0)
    assert np.isnan(np.asarray(k)[1, 0]).all()


def shares_one_scale(pages, k, v, slots):
    """A planted bug: one scale for all tokens of a call, as a scale per page would be."""
    scale = np.full(k.shape[:2], np.abs(k).max() / 127, np.float32)
    k = np.rint(k / scale[..., None]).astype(np.int8)
    v, v_scale = encode(v, np.dtype(np.int8))
    return import_span(pages, kernels.KVSpan(*map(jnp.asarray, (k, v, scale, v_scale))), slots)


def test_a_scale_that_is_not_the_rows_own_is_caught():
    pages, (k, v) = random_pages(1, np.int8), random_tokens(2)
    slots = jnp.arange(8, dtype=jnp.int32)
    want = write_slots(pages, k, v, slots, backend="reference")
    with pytest.raises(AssertionError):
        assert_same_pages(shares_one_scale(pages, k, v, slots), want)


@pytest.mark.parametrize("kind", ["f32", "bf16 as uint16", "int8", "float8 as uint8"])
@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("operation", ["write", "copy", "import"])
def test_a_donated_pool_is_updated_in_place(operation, latent, kind):
    """Result aliases the whole pool, and temporaries stay below one per cent of it."""
    dtype = KINDS[kind]
    pool: Any = jax.ShapeDtypeStruct((2048, 3, 16, 64), dtype)
    scale: Any = None
    if kind in ("int8", "float8 as uint8"):
        scale = jax.ShapeDtypeStruct((2048, 3, 16), np.float32)
    pages = LayerPages(pool, None if latent else pool, scale, None if latent else scale)
    new: Any = jax.ShapeDtypeStruct((8, 3, 64), np.float32)
    ids = jax.ShapeDtypeStruct((8,), np.int32)
    if operation == "write":
        lowered = jax.jit(write_slots, donate_argnums=0).lower(
            pages, new, None if latent else new, ids
        )
    elif operation == "copy":
        lowered = jax.jit(copy_pages, donate_argnums=0).lower(pages, ids, ids)
    else:
        span = jax.eval_shape(export_span, pages, ids)
        lowered = jax.jit(import_span, donate_argnums=0).lower(pages, span, ids)
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pages))
    assert memory.alias_size_in_bytes == num_bytes
    assert memory.temp_size_in_bytes < 0.01 * num_bytes


def test_a_donated_pool_is_consumed():
    pages = jax.tree.map(jnp.asarray, random_pages(5))
    k, v = random_tokens(6)
    jax.jit(write_slots, donate_argnums=0)(pages, k, v, np.arange(TOKENS, dtype=np.int32))
    assert pages.k.is_deleted()


def test_arguments_that_do_not_fit_are_refused():
    pages, (k, v) = random_pages(7), random_tokens(8)
    ids = jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match="one slot per token"):
        write_slots(pages, k, v, ids)
    with pytest.raises(ValueError, match="values given: False"):
        write_slots(pages, k, None, jnp.zeros(TOKENS, jnp.int32))
    with pytest.raises(ValueError, match="as many sources"):
        copy_pages(pages, ids, ids[:2])
    with pytest.raises(ValueError, match="pages hold widths"):
        write_slots(pages, k[..., :4], v, jnp.zeros(TOKENS, jnp.int32))
    with pytest.raises(ValueError, match=r"keys must be \[tokens, 3"):
        write_slots(pages, k[:, :2], v, jnp.zeros(TOKENS, jnp.int32))
    with pytest.raises(ValueError, match="slots must be integers, got float32"):
        gather_slots(pages, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="slots must be a vector"):
        gather_slots(pages, np.zeros((3, 1), np.int32))
    with pytest.raises(ValueError, match="need widths"):
        gather_slots(pack_pages(pages), ids)
    with pytest.raises(ValueError, match="lanes do not hold"):
        write_slots(pack_pages(pages), np.zeros((8, 3, 200)), v, jnp.zeros(8, jnp.int32))
    span = export_span(random_pages(7, np.int8), ids)
    with pytest.raises(ValueError, match="the span holds int8"):
        import_span(pages, span, ids)
