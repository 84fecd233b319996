"""Products with weights: accurate, and the same bits for a row in every batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels import int8_linear, linear, quantise_rows
from tests.pallas_kernels.test_reductions import assert_rows_keep_their_bits

COUNTS = (1, 2, 3, 7, 8, 16, 64, 256)
SHAPES = [(576, 960), (1536, 576), (64, 192), (320, 48)]  # in, out


def weights(in_: int, out: int, dtype=np.float32):
    w = np.random.default_rng(1).standard_normal((out, in_)) / np.sqrt(in_)
    return jnp.asarray(w, dtype)


def inputs(rows: int, in_: int) -> Any:
    return np.random.default_rng(2).standard_normal((rows, in_)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("in_", "out"), SHAPES)
def test_a_row_keeps_its_bits_in_every_batch(in_, out, dtype):
    w = weights(in_, out, dtype)
    assert_rows_keep_their_bits(lambda x: linear(x, w), inputs(512, in_), COUNTS)


@pytest.mark.parametrize(("in_", "out"), SHAPES[:2])
def test_an_int8_row_keeps_its_bits_in_every_batch(in_, out):
    w, scale = quantise_rows(weights(in_, out))
    assert_rows_keep_their_bits(lambda x: int8_linear(x, w, scale[:, 0]), inputs(512, in_), COUNTS)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("pad", [True, False])
def test_linear_is_the_matrix_product_in_float32(dtype, tolerance, pad):
    w, x = weights(64, 48, dtype), inputs(1, 64)
    y = linear(x, w, pad_single_row=pad)
    assert y.dtype == jnp.float32
    want = x.astype(np.float64) @ np.asarray(w, np.float64).T
    np.testing.assert_allclose(y, want, atol=3 * tolerance)


def test_weights_may_have_several_output_axes():
    w, x = weights(64, 48), inputs(3, 64)
    y = linear(x, w.reshape(6, 8, 64))
    np.testing.assert_array_equal(y.reshape(3, 48), linear(x, w))
    q, scale = quantise_rows(w)
    y = int8_linear(x, q.reshape(6, 8, 64), scale.reshape(6, 8))
    np.testing.assert_array_equal(y.reshape(3, 48), int8_linear(x, q, scale[:, 0]))


def test_int8_stays_within_the_rounding_of_its_two_factors():
    w, x = weights(576, 96), inputs(5, 576)
    q, scale = quantise_rows(w)
    error = np.asarray(int8_linear(x, q, scale[:, 0])) - x @ np.asarray(w).T
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


def test_a_single_row_is_doubled_only_where_asked():
    w, x = weights(64, 48), inputs(1, 64)
    padded = jax.jit(linear).lower(x, w).as_text()
    kept = jax.jit(lambda x, w: linear(x, w, pad_single_row=False)).lower(x, w).as_text()
    assert "tensor<2x48xf32>" in padded
    assert "tensor<2x48xf32>" not in kept
