"""Page copies and rotary shifts of Mosaic GPU: interpreted, and on a GPU, against the oracles."""

import functools
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from kvjax.pallas_kernels import LayerPages, copy_pages, hopper, rotary_shift, rotary_tables
from kvjax.pallas_kernels.compat import interpret_gpu
from kvjax.pallas_kernels.page_ops import gpu as copies
from kvjax.pallas_kernels.reposition import gpu as shifts
from tests.pallas_kernels.gpu_devices import IN_PLACE, INTERPRETED, ON_GPU

RUNS = (
    pytest.param(True, marks=(INTERPRETED, IN_PLACE), id="interpreted"),
    pytest.param(False, marks=(*ON_GPU, IN_PLACE), id="gpu"),
)


def _interpret(interpreted):
    return interpret_gpu(detect_races=True) if interpreted else None


def _bits(shape, seed=0) -> Any:
    return np.random.default_rng(seed).integers(0, 2**16, shape).astype(np.uint16)


@pytest.mark.parametrize("interpreted", RUNS)
@pytest.mark.parametrize("quantised", [False, True], ids=["bfloat16", "int8"])
def test_all_sources_are_read_before_any_destination_is_written(interpreted, quantised):
    """Chains, a swap, a page onto itself and padding."""
    src: Any = np.array([0, 1, 2, 4, 5, 7, 6], np.int32)
    dst: Any = np.array([1, 2, -1, 5, 4, 7, 3], np.int32)
    k, v = _bits((9, 2, 16, 64)), _bits((9, 2, 16, 128), 1)
    pages = LayerPages(k, v)
    if quantised:
        scale: Any = np.random.default_rng(2).random((9, 2, 16)).astype(np.float32)
        pages = LayerPages(k.astype(np.int8), v.astype(np.int8), scale, scale + 1)
    call = jax.jit(functools.partial(copies.copy_pages, interpret=_interpret(interpreted)))
    got = call(pages, src, dst)
    want = copy_pages(pages, src, dst, backend="reference")
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("interpreted", RUNS)
@pytest.mark.parametrize("dtype", [np.uint16, np.int8])
def test_latent_pages_wider_than_a_box_are_copied_in_pieces(interpreted, dtype):
    ids: Any = np.array([0, 1, 4], np.int32)
    dst: Any = np.array([1, 3, 2], np.int32)
    pages = LayerPages(_bits((6, 1, 32, 576)).astype(dtype))
    call = jax.jit(functools.partial(copies.copy_pages, interpret=_interpret(interpreted)))
    got: Any = call(pages, ids, dst)
    want: Any = copy_pages(pages, ids, dst, backend="reference")
    assert np.array_equal(np.asarray(got.k), np.asarray(want.k))


def test_shifts_of_scaled_keys_are_refused_with_the_reason():
    slots: Any = np.arange(4, dtype=np.int32)
    tables: Any = rotary_tables([1] * 4, np.ones(32))
    scale: Any = np.ones((4, 1, 16), np.float32)
    pages = LayerPages(_bits((4, 1, 16, 64)).astype(np.int8), None, scale)
    with pytest.raises(NotImplementedError, match="new scales"), hopper.ahead_of_time():
        shifts.reposition(pages, slots, None, *tables)


def _numbers(bits):
    return np.asarray(bits).view(ml_dtypes.bfloat16).astype(np.float64)


@pytest.mark.parametrize("interpreted", RUNS)
@pytest.mark.parametrize(
    ("page_size", "kv_heads", "width", "half", "first"),
    [(16, 2, 64, 32, 0), (64, 3, 64, 32, 0), (128, 1, 128, 32, 0), (64, 1, 128, 32, 64)],
)
def test_shifted_keys_match_the_oracle_and_all_else_keeps_its_bits(
    interpreted, page_size, kv_heads, width, half, first
):
    """A block of whole runs, one of scattered slots, and padding."""
    rng = np.random.default_rng(0)
    shape = (512 // page_size, kv_heads, page_size, width)
    k: Any = rng.standard_normal(shape).astype(ml_dtypes.bfloat16).view(np.uint16)
    pages = LayerPages(k, k + 1)
    scattered = rng.permutation(np.arange(128, 256))[:30]
    slots: Any = np.concatenate([np.arange(64, 128), scattered, [-1] * 3]).astype(np.int32)
    tables: Any = rotary_tables(
        rng.integers(-500, 500, len(slots)), 10000.0 ** -(np.arange(half) / half)
    )

    @jax.jit
    def call(pages, slots, cos, sin):
        return shifts.reposition(
            pages, slots, None, cos, sin, rotary_offset=first, interpret=_interpret(interpreted)
        )

    got = call(pages, slots, *tables)
    want: Any = rotary_shift(pages, slots, *tables, rotary_offset=first, backend="reference")
    np.testing.assert_allclose(_numbers(got.k), _numbers(want.k), rtol=1e-2, atol=1e-2)
    kept = np.ones(512, bool)
    kept[slots[slots >= 0]] = False
    kept = kept.reshape(-1, page_size)
    assert np.array_equal(np.asarray(got.k).swapaxes(1, 2)[kept], k.swapaxes(1, 2)[kept])
    assert got.v is not None
    assert np.array_equal(np.asarray(got.v), k + 1)


def test_moves_between_slots_are_refused():
    slots: Any = np.arange(4, dtype=np.int32)
    tables: Any = rotary_tables([1] * 4, np.ones(32))
    pages = LayerPages(_bits((4, 1, 16, 64)), _bits((4, 1, 16, 64)))
    with pytest.raises(NotImplementedError, match="need a temporary"), hopper.ahead_of_time():
        shifts.reposition(pages, slots, slots + 4, *tables)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 1, 16, 68), np.uint16), ((4, 1, 512, 64), np.uint16)]
)
def test_pages_that_are_no_box_are_refused(shape, dtype):
    ids: Any = np.arange(2, dtype=np.int32)
    pool: Any = np.zeros(shape, dtype)
    with pytest.raises(NotImplementedError, match="no TMA box"), hopper.ahead_of_time():
        copies.copy_pages(LayerPages(pool), ids, ids + 2)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="from jax 0.11 on it runs")
def test_jax_without_in_place_kernels_is_refused():
    ids: Any = np.arange(2, dtype=np.int32)
    pages = LayerPages(_bits((4, 1, 16, 64)))
    with pytest.raises(NotImplementedError, match="no in-place"), hopper.ahead_of_time():
        jax.eval_shape(copies.copy_pages, pages, ids, ids + 2)
