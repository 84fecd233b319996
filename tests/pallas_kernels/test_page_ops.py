"""Writes, gathers and copies of pages: equal to the specification, and in place when donated."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.pallas_kernels import (
    OPERATIONS,
    LayerPages,
    Pages,
    copy_pages,
    gather_slots,
    write_slots,
)
from kvjax.pallas_kernels.page_ops import xla

PAGES, SIZE, HEADS = 6, 4, 3
TOKENS = 8
KINDS = {"f32": np.float32, "bf16 as uint16": np.uint16, "bf16": jnp.bfloat16}

jit_write = jax.jit(write_slots, static_argnames="backend")
jit_gather = jax.jit(gather_slots)
jit_copy = jax.jit(copy_pages)


def random_pages(seed: int, dtype=np.float32, latent: bool = False) -> Any:
    rng = np.random.default_rng(seed)

    def pool(width) -> Any:
        numbers = rng.standard_normal((PAGES, HEADS, SIZE, width)).astype(np.float32)
        if dtype == np.uint16:
            return np.asarray(jnp.asarray(numbers, jnp.bfloat16)).view(np.uint16)
        return np.asarray(jnp.asarray(numbers, dtype))

    return LayerPages(pool(8), None if latent else pool(6))


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
            np.testing.assert_array_equal(np.asarray(x).astype(np.float64), y)


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


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("operation", ["write", "copy"])
def test_a_donated_pool_is_updated_in_place(operation, latent, dtype):
    """Result aliases the whole pool, and temporaries stay below one per cent of it."""
    pool: Any = jax.ShapeDtypeStruct((2048, 3, 16, 64), dtype)
    pages = LayerPages(pool, None if latent else pool)
    new = jax.ShapeDtypeStruct((8, 3, 64), np.float32)
    ids = jax.ShapeDtypeStruct((8,), np.int32)
    if operation == "write":
        lowered = jax.jit(write_slots, donate_argnums=0).lower(
            pages, new, None if latent else new, ids
        )
    else:
        lowered = jax.jit(copy_pages, donate_argnums=0).lower(pages, ids, ids)
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    num_bytes = sum(x.size * np.dtype(dtype).itemsize for x in pages if x is not None)
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
