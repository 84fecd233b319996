"""Products with weights: accurate, and the same bits for a row in every batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels import (
    Panels,
    gate,
    gated_linear,
    linear,
    pack,
    packs,
    quantise_rows,
)
from tests.pallas_kernels.test_reductions import assert_rows_keep_their_bits

COUNTS = (1, 2, 3, 7, 8, 16, 64, 256)
SHAPES = [(576, 960), (1536, 576), (64, 192), (320, 48)]  # in, out
needs_packing = pytest.mark.skipif(not packs(), reason="no C++ compiler: see test_native.py")
FORMS = ["as it lies", pytest.param("packed", marks=needs_packing)]


def wide(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def formed(w: Any, form: str) -> Any:
    return Panels(jnp.asarray(pack(np.asarray(w))), w.shape) if form == "packed" else w


def weights(in_: int, out: int, dtype=np.float32):
    w = np.random.default_rng(1).standard_normal((out, in_)) / np.sqrt(in_)
    return jnp.asarray(w, dtype)


def inputs(rows: int, in_: int) -> Any:
    return np.random.default_rng(2).standard_normal((rows, in_)).astype(np.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("in_", "out"), SHAPES)
def test_a_row_keeps_its_bits_in_every_batch(in_, out, dtype, form):
    w = formed(weights(in_, out, dtype), form)
    assert_rows_keep_their_bits(lambda x: linear(x, w), inputs(512, in_), COUNTS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("in_", "out"), SHAPES[:2])
def test_an_int8_row_keeps_its_bits_in_every_batch(in_, out, form):
    w, scale = quantise_rows(weights(in_, out))
    w = formed(w, form)
    assert_rows_keep_their_bits(lambda x: linear(x, w, scale[:, 0]), inputs(512, in_), COUNTS)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_linear_is_the_matrix_product_in_float32(dtype, tolerance, pad, form):
    w, x = weights(64, 48, dtype), inputs(1, 64)
    y = linear(x, formed(w, form), pad_single_row=pad)
    assert y.dtype == jnp.float32
    want = x.astype(np.float64) @ np.asarray(w, np.float64).T
    np.testing.assert_allclose(y, want, atol=3 * tolerance)


def test_weights_may_have_several_output_axes():
    w, x = weights(64, 48), inputs(3, 64)
    y = linear(x, w.reshape(6, 8, 64))
    np.testing.assert_array_equal(y.reshape(3, 48), linear(x, w))
    q, scale = quantise_rows(w)
    y = linear(x, q.reshape(6, 8, 64), scale.reshape(6, 8))
    np.testing.assert_array_equal(y.reshape(3, 48), linear(x, q, scale[:, 0]))


def test_int8_stays_within_the_rounding_of_its_two_factors():
    w, x = weights(576, 96), inputs(5, 576)
    q, scale = quantise_rows(w)
    error = np.asarray(linear(x, q, scale[:, 0])) - x @ np.asarray(w).T
    step_x = np.abs(x).max(-1, keepdims=True) / 127
    step_w = np.abs(np.asarray(w)).max(-1) / 127
    spread = step_x * np.linalg.norm(w, axis=-1) + np.linalg.norm(x, axis=-1)[:, None] * step_w
    assert (np.abs(error) < 5 * spread / np.sqrt(12)).all()


def test_quantised_rows_come_back_within_half_a_step():
    x = inputs(5, 64)
    x[2] = 0
    q, scale = quantise_rows(x)
    assert (q.dtype, scale.shape) == (jnp.int8, (5, 1))
    assert (np.abs(np.asarray(q) * np.asarray(scale) - x) <= 0.5001 * np.asarray(scale)).all()


@needs_packing
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("in_", "out"), [(1, 1), (3, 31), (37, 33), (64, 32), (130, 100)])
@pytest.mark.parametrize("rows", [1, 5, 12, 13, 30, 200])
def test_packed_weights_of_any_size_give_the_product(rows, in_, out, kind):
    x = inputs(rows, in_)
    if kind == "int8":
        w, scale = quantise_rows(weights(in_, out))
        q, x_scale = quantise_rows(x)
        want = (wide(q) * wide(x_scale)) @ (wide(w) * wide(scale)).T
        y = linear(x, formed(w, "packed"), scale[:, 0], backend="cpu")
    else:
        w = weights(in_, out, kind)
        want = wide(jnp.asarray(x, kind)) @ wide(w).T
        y = linear(x, formed(w, "packed"), backend="cpu")
    assert y.shape == (rows, out)
    np.testing.assert_allclose(y, want, atol=2e-5)


@needs_packing
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("half", [96, 40])  # whole panels, or not
def test_a_gated_product_is_the_product_gated(half, kind, activation):
    w: Any = weights(70, 2 * half) * 4
    scale = None
    if kind == "int8":
        w, scale = quantise_rows(w)
        scale = scale.reshape(2, half)
    w = formed(w.astype(kind).reshape(2, half, 70), "packed")
    x = inputs(14, 70)
    y = linear(x, w, scale)
    gated = gated_linear(x, w, scale, activation=activation)
    want = gate(y[:, 0], y[:, 1], activation)
    np.testing.assert_allclose(gated, want, rtol=2e-6, atol=1e-5)


def test_gated_weights_of_another_form_are_refused():
    with pytest.raises(ValueError, match=r"\[2, half, in\], got \(48, 64\)"):
        gated_linear(inputs(2, 64), weights(64, 48), activation="silu")


@needs_packing
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int8])
def test_rows_of_packed_weights_are_the_rows_that_were_packed(dtype):
    w = np.asarray(weights(37, 70) * 50).astype(dtype)
    ids = np.array([0, 31, 32, 69, 5, 5], np.int32)
    np.testing.assert_array_equal(formed(w, "packed").rows(ids), w[ids])


@needs_packing
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int8])
def test_what_is_not_finite_stays_so_and_in_its_row(dtype):
    w, scale = quantise_rows(weights(64, 48))
    x = inputs(14, 64)
    x[3, 5], x[9, 63] = np.nan, np.inf
    if dtype == np.int8:
        y = np.asarray(linear(x, formed(w, "packed"), scale[:, 0]))
    else:
        y = np.asarray(linear(x, formed(weights(64, 48, dtype), "packed")))
    bad = [3, 9]
    assert not np.isfinite(y[bad]).any()
    assert np.isfinite(np.delete(y, bad, axis=0)).all()


def test_each_backend_refuses_the_other_form():
    w, x = weights(64, 48), inputs(2, 64)
    with pytest.raises(NotImplementedError, match="not packed"):
        linear(x, w, backend="cpu")
    with pytest.raises(NotImplementedError, match="packed for the cpu"):
        linear(x, formed(w, "packed"), backend="xla")


def test_a_single_row_is_doubled_only_where_asked():
    w, x = weights(64, 48), inputs(1, 64)
    padded = jax.jit(linear).lower(x, w).as_text()
    kept = jax.jit(lambda x, w: linear(x, w, pad_single_row=False)).lower(x, w).as_text()
    assert "tensor<2x48xf32>" in padded
    assert "tensor<2x48xf32>" not in kept


@needs_packing
@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int8], ids=["f32", "bf16", "int8"])
@pytest.mark.parametrize("in_use", [0, 4, 13, 16])
def test_rows_of_zeros_behind_the_others_give_zeros_and_change_no_bit(in_use, dtype, gates):
    """A step's padding stands there, and is not multiplied."""
    q, scale = quantise_rows(weights(64, 96))
    w = q if dtype is np.int8 else weights(64, 96, dtype)
    w = formed(np.asarray(w).reshape(2, 48, 64), "packed")
    scale = scale.reshape(2, 48) if dtype is np.int8 else None

    def product(x: Any) -> np.ndarray:
        y = gated_linear(x, w, scale, activation="silu") if gates else linear(x, w, scale)
        return np.asarray(y)

    x = inputs(16, 64)
    x[in_use:], x[2:4] = 0, 0
    y, full = product(x), product(np.where(np.arange(16)[:, None] < in_use, x, 1))
    np.testing.assert_array_equal(y[:in_use], full[:in_use])
    assert not y[in_use:].any()
    assert not y[2:4].any()
