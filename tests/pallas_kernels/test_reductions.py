"""Row sums and the exponential: accurate, and the same bits for a row in every batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels import row_mean_square, row_sum, steady_exp
from kvjax.pallas_kernels.reductions import exp_parts, power_of_two

ROW_COUNTS = (1, 2, 3, 4, 7, 8, 16)
WIDTHS = (8, 33, 64, 256, 576, 2048, 4096, 4097, 49152)


def assert_rows_keep_their_bits(fn, x, counts=ROW_COUNTS) -> None:
    """`fn` of a few rows equals the same rows of `fn` of all."""
    run = jax.jit(fn)
    whole = np.asarray(run(x))
    for count in counts:
        for first in {0, 1, len(x) - count}:
            part = np.asarray(run(x[first : first + count]))
            np.testing.assert_array_equal(part, whole[first : first + count], err_msg=f"{count=}")


def numbers(rows: int, width: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


@pytest.mark.parametrize("width", WIDTHS)
def test_row_sums_keep_their_bits_in_every_batch(width):
    assert_rows_keep_their_bits(row_sum, numbers(512 if width < 4000 else 32, width))


@pytest.mark.parametrize("width", [64, 576, 2048])
def test_sums_of_fused_expressions_keep_their_bits(width):
    x = numbers(512, width)
    assert_rows_keep_their_bits(row_mean_square, x)

    def softmax_sum(x):
        return row_sum(steady_exp(x - jnp.max(x, axis=-1, keepdims=True)))

    assert_rows_keep_their_bits(softmax_sum, x, counts=(1, 4, 8))


@pytest.mark.parametrize("width", WIDTHS)
def test_row_sums_are_accurate(width):
    x = numbers(3, width)
    error = np.abs(np.asarray(row_sum(x)) - x.astype(np.float64).sum(-1))
    assert (error <= 1e-6 * np.abs(x).sum(-1)).all()


def test_leading_axes_are_kept():
    x = numbers(6, 40).reshape(2, 3, 40)
    assert row_sum(x).shape == (2, 3)
    np.testing.assert_array_equal(row_sum(x).reshape(6), row_sum(x.reshape(6, 40)))
    assert row_mean_square(x).shape == (2, 3, 1)
    np.testing.assert_allclose(row_mean_square(x)[..., 0], (x**2).mean(-1), rtol=1e-6)


def test_integers_and_bfloat16_sum_in_float32():
    assert row_sum(jnp.ones((2, 300), jnp.bfloat16)).tolist() == [300.0, 300.0]


def test_the_exponential_is_within_2e_7_of_the_exact_one():
    x = np.concatenate([np.linspace(-87, 88, 200_001), [0.0, -0.0, 1e-30]]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(np.asarray(jax.jit(steady_exp)(x)) / exact - 1)) <= 2e-7
    assert float(steady_exp(jnp.float32(0))) == 1.0


def test_the_exponential_of_the_very_small_is_zero_and_nan_stays_nan():
    x = np.array([-1e30, -np.inf, -88, -1e4, np.nan], np.float32)
    y = np.asarray(jax.jit(steady_exp)(x))
    np.testing.assert_array_equal(y, [0, 0, 0, 0, np.nan])


def test_the_exponential_keeps_its_bits_in_every_shape():
    x = numbers(512, 9) * 4
    assert_rows_keep_their_bits(steady_exp, x)
    assert_rows_keep_their_bits(lambda x: steady_exp(x - jnp.max(x, -1, keepdims=True)), x)


def test_powers_of_two_are_exact():
    n = np.arange(-200, 128, dtype=np.float32)
    want = np.where(n < -126, 0, np.exp2(n.astype(np.float64)))
    np.testing.assert_array_equal(jax.jit(power_of_two)(n), want)


def test_rescaling_by_powers_of_two_keeps_its_bits_in_every_shape():
    """What `l * fade + added` needs; with `steady_exp` as `fade`, jax 0.12 fails it at 9 rows."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((512, 3)).astype(np.float32)
    x[:, 1] = np.round(x[:, 1] * 5) - 10
    assert_rows_keep_their_bits(
        lambda x: x[:, 0] * power_of_two(x[:, 1]) + x[:, 2], x, counts=(*ROW_COUNTS, 9, 12, 21)
    )


def test_the_parts_of_an_exponential_are_a_whole_power_and_a_small_fraction():
    x = np.linspace(-3000, 3000, 10_001).astype(np.float32)
    fraction, power = (np.asarray(part, np.float64) for part in jax.jit(exp_parts)(x))
    np.testing.assert_array_equal(power, np.round(power))
    assert fraction.min() > 0.7
    assert fraction.max() < 1.42
    log = np.log(fraction) + power * np.log(2)
    np.testing.assert_allclose(log, x.astype(np.float64), rtol=0, atol=1e-6)
