"""Page operations and repositioning of the Mosaic TPU kernels, in interpret mode."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.pallas_kernels import (
    LayerPages,
    PackedPages,
    compat,
    pack_pages,
    rotary_tables,
    split_pages,
)
from kvjax.pallas_kernels.page_ops import reference, tpu, tpu_rows
from kvjax.pallas_kernels.reposition import reference as reposition_reference
from kvjax.pallas_kernels.reposition import tpu as reposition_tpu

PAGES, HEADS, PAGE, WIDTH, TOKENS = 6, 3, 32, 64, 40
SLOTS = np.full(TOKENS, -1, np.int32)
SLOTS[:20] = 37 + np.arange(20)  # a run over the edges of tiles and pages
SLOTS[22:26] = [3, 100, 191, 0]
SLOTS[30:40] = 120 + np.arange(10)[::-1]  # backwards: runs of one
KINDS = [np.float32, np.uint16, np.int8, np.uint8]
QUICK = {"xla_backend_optimization_level": 0}


def jit(fn, **static):
    return jax.jit(functools.partial(fn, interpret=True, **static), compiler_options=QUICK)


def filled(kind, *, latent: bool = False, seed: int = 0) -> LayerPages:
    """Pages of random numbers."""
    rng = np.random.default_rng(seed)

    def pool():
        return reference.encode(rng.standard_normal((PAGES, HEADS, PAGE, WIDTH)), np.dtype(kind))

    (k, k_scale), (v, v_scale) = pool(), pool()
    pages: Any = (k, None if latent else v, k_scale, None if latent else v_scale)
    return LayerPages(*pages)


def packed(pages: LayerPages):
    return pack_pages(jax.tree.map(jnp.asarray, pages))


def split(pages, latent: bool = False) -> LayerPages:
    return split_pages(pages, WIDTH, None if latent else WIDTH)


def assert_same_bits(got, want) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: np.dtype(kind).name)
@pytest.mark.parametrize("latent", [False, pytest.param(True, marks=pytest.mark.slow)], ids=str)
def test_writes_reads_and_copies_keep_every_bit(kind, latent):
    rng, pages = np.random.default_rng(1), filled(kind, latent=latent)
    k = rng.standard_normal((TOKENS, HEADS, WIDTH)).astype(np.float32)
    v = None if latent else rng.standard_normal(k.shape).astype(np.float32)
    got = jit(tpu.write_slots)(packed(pages), k, v, SLOTS)
    want = reference.write_slots(pages, k, v, SLOTS)
    assert_same_bits(split(got, latent), want)
    widths = (WIDTH, None if latent else WIDTH)
    span = jit(tpu.export_span, widths=widths)(got, slots=SLOTS[::-1].copy())
    assert_same_bits(span, reference.export_span(want, SLOTS[::-1]))
    src, dst = np.array([1, 2, 3, 0], np.int32), np.array([2, 1, -1, 5], np.int32)  # a swap in it
    copied = jit(tpu.copy_pages)(got, src, dst)
    assert_same_bits(split(copied, latent), reference.copy_pages(want, src, dst))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: np.dtype(kind).name)
@pytest.mark.parametrize("dst", [None, np.roll(SLOTS, 3)], ids=["shift", "overlapping move"])
def test_repositioned_keys_match_the_oracle_and_nothing_else_changes(kind, dst):
    pages = filled(kind)
    cos, sin = rotary_tables(3 * np.arange(TOKENS), 10000.0 ** -np.linspace(0, 1, WIDTH // 2))
    options = {"patch_k": None, "patch_v": None, "frame": "source", "rotary_offset": 0}
    got = split(jit(reposition_tpu.reposition, **options)(packed(pages), SLOTS, dst, cos, sin))
    want = reposition_reference.reposition(pages, SLOTS, dst, cos, sin, **options)
    assert_same_bits((got.v, got.v_scale), (want.v, want.v_scale))
    tolerance = 1e-6 if kind == np.float32 else 2e-2
    k = reference.decode(got.k, got.k_scale), reference.decode(want.k, want.k_scale)
    np.testing.assert_allclose(*k, rtol=tolerance, atol=tolerance)
    kept = np.setdiff1d(np.arange(PAGES * PAGE), SLOTS if dst is None else dst)
    for a, b in zip(got, pages, strict=True):
        if b is not None:
            a, b = np.asarray(a), np.asarray(b)
            assert_same_bits(
                a[kept // PAGE, :, kept % PAGE].copy(), b[kept // PAGE, :, kept % PAGE].copy()
            )


def test_patches_are_added_in_their_frame():
    rng, pages = np.random.default_rng(2), filled(np.float32)
    cos, sin = rotary_tables(3 * np.arange(TOKENS), 10000.0 ** -np.linspace(0, 1, WIDTH // 2))
    patch_k, patch_v = rng.standard_normal((2, TOKENS, HEADS, WIDTH)).astype(np.float32)
    for frame in ("source", "target"):
        options = {"patch_k": patch_k, "patch_v": patch_v, "frame": frame, "rotary_offset": 0}
        dst = np.roll(SLOTS, 3)
        got = split(jit(reposition_tpu.reposition, **options)(packed(pages), SLOTS, dst, cos, sin))
        want = reposition_reference.reposition(pages, SLOTS, dst, cos, sin, **options)
        np.testing.assert_allclose(got.k, want.k, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.asarray(got.v), np.asarray(want.v), rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(48)), st.lists(st.booleans(), min_size=24, max_size=24))
def test_runs_bring_every_row_to_its_place_and_never_leave_a_tile(slots, wanted):
    dst = np.where(wanted, sorted(slots[:12]) + slots[12:24], -1).astype(np.int32)
    runs = tpu_rows.runs(jnp.arange(24, dtype=jnp.int32), jnp.asarray(dst), 8)
    src, to, length = (np.asarray(x) for x in runs[:3])
    moved = {}
    for i in range(int(runs.used[0])):
        for end in (src[i], to[i]):
            assert end // 8 == (end + max(length[i], 1) - 1) // 8
        moved |= {int(src[i]) + j: int(to[i]) + j for j in range(length[i])}
    assert moved == {t: int(d) for t, d in enumerate(dst) if d >= 0}
    assert length[int(runs.used[0]) :].sum() == 0
    assert (np.diff(to[: int(runs.used[0])]) > 0).all()  # a tile is open once


def test_more_rows_than_scalar_memory_holds_are_moved_in_parts(monkeypatch):
    monkeypatch.setattr(tpu_rows, "MOST_RUNS", 16)
    pages = filled(np.float32)
    cos, sin = rotary_tables(3 * np.arange(TOKENS), 10000.0 ** -np.linspace(0, 1, WIDTH // 2))
    options = {"patch_k": None, "patch_v": None, "frame": "source", "rotary_offset": 0}
    for dst in (None, np.roll(SLOTS, 3)):
        got = split(jit(reposition_tpu.reposition, **options)(packed(pages), SLOTS, dst, cos, sin))
        want = reposition_reference.reposition(pages, SLOTS, dst, cos, sin, **options)
        np.testing.assert_allclose(got.k, want.k, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(got.v, want.v)


@pytest.mark.parametrize("mode", ["eager", "on_wait"])
def test_copies_and_writes_do_not_race(mode):
    pages = filled(np.float32)
    how = {"interpret": compat.tpu_interpreter(dma_execution_mode=mode)}
    src, dst = np.array([1, 2, 3, 0], np.int32), np.array([2, 1, -1, 5], np.int32)
    got = jax.jit(functools.partial(tpu.copy_pages, **how))(packed(pages), src, dst)
    jax.block_until_ready(got)
    assert not compat.tpu_races()
    assert_same_bits(split(got), reference.copy_pages(pages, src, dst))
    k, v = np.random.default_rng(3).standard_normal((2, 6, HEADS, WIDTH)).astype(np.float32)
    slots = np.array([5, 6, -1, 7, 130, 8], np.int32)
    got = jax.jit(functools.partial(tpu.write_slots, **how))(packed(pages), k, v, slots)
    jax.block_until_ready(got)
    assert not compat.tpu_races()
    assert_same_bits(split(got), reference.write_slots(pages, k, v, slots))


def test_pages_that_are_no_whole_tiles_are_refused():
    pages = PackedPages(jnp.zeros((2, 1, 16, 128), jnp.int8), jnp.zeros((2, 8, 128)))
    k = jnp.zeros((1, 1, 64))
    with pytest.raises(NotImplementedError, match="page_size=16 of int8"):
        tpu.write_slots(pages, k, k, jnp.zeros(1, jnp.int32), interpret=True)


def test_bfloat16_numbers_and_their_bits_are_written_alike():
    pages = filled(np.uint16)
    numbers = jax.tree.map(lambda x: x.view(ml_dtypes.bfloat16), pages)
    k, v = np.random.default_rng(4).standard_normal((2, TOKENS, HEADS, WIDTH)).astype(np.float32)
    write = jit(tpu.write_slots)
    assert_same_bits(write(packed(pages), k, v, SLOTS), write(packed(numbers), k, v, SLOTS))
