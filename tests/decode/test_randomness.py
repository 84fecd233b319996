"""Keys follow the design's formula; the noise is Gumbel noise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.decode import Purpose, gumbel_noise, request_keys


def keys_of(seed, branch, position, purpose=Purpose.DRAW):
    return request_keys(
        jnp.asarray([seed & 0xFFFFFFFF], jnp.uint32),
        jnp.asarray([seed >> 32], jnp.uint32),
        jnp.asarray([branch], jnp.int32),
        jnp.asarray([position], jnp.int32),
        purpose,
    )


def test_a_key_folds_branch_position_and_purpose_into_the_seed():
    expected = jax.random.key(42, impl="threefry2x32")
    for part in (3, 17, Purpose.RESAMPLE.value):
        expected = jax.random.fold_in(expected, part)
    mine = keys_of(42, 3, 17, Purpose.RESAMPLE)
    np.testing.assert_array_equal(jax.random.key_data(mine)[0], jax.random.key_data(expected))


def test_every_part_of_the_key_changes_the_noise():
    parts = list(itertools.product((0, 1, 1 << 32, (1 << 64) - 1), (0, 1), (0, 1), Purpose))
    seen = {np.asarray(jax.random.key_data(keys_of(*part))).tobytes() for part in parts}
    assert len(seen) == len(parts)


def test_the_purposes_are_fixed_numbers():
    assert [(p.name, p.value) for p in Purpose] == [
        ("DRAW", 0),
        ("DRAFT", 1),
        ("ACCEPT", 2),
        ("RESAMPLE", 3),
        ("DENOISE", 4),
    ]


def test_the_noise_has_the_gumbel_distribution_also_in_the_upper_tail():
    noise = np.asarray(gumbel_noise(keys_of(5, 0, 0), 1 << 20)[0], np.float64)
    assert np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(0.5772157, abs=0.006)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.02)
    for threshold in (0.0, 2.0, 6.0, 9.0):
        share = -np.expm1(-np.exp(-threshold))
        spread = 5 * np.sqrt(share * (1 - share) / noise.size)
        assert (noise > threshold).mean() == pytest.approx(share, abs=spread)


def test_noise_reaches_what_32_bits_allow_and_never_infinity():
    bits = jnp.asarray([0, 1, 2**31, 2**32 - 1], jnp.uint32)
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    ends = -jnp.log(-jnp.log1p(-uniform))
    assert jnp.isfinite(ends).all()
    assert ends[0] > 22.8
