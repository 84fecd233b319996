"""Rotary embedding against transformers (`golden/rope.json`), and its own laws."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.models import llama, model_config
from kvjax.models.config import RopeConfig
from kvjax.models.rope import rope_table
from kvjax.models.rope import rotate as rotate_on_device

GOLDEN = json.loads((Path(__file__).parent / "golden" / "rope.json").read_text())
REST = {
    "vocab_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "first_k_dense_replace": 1,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "kv_lora_rank": 8,
}


def rotate(x: np.ndarray, table: np.ndarray, *, interleaved: bool = False) -> np.ndarray:
    return np.asarray(rotate_on_device(jnp.asarray(x), jnp.asarray(table), interleaved=interleaved))


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden["name"])
def test_frequencies_and_amplitude_are_those_of_transformers(golden: dict) -> None:
    rope = model_config(REST | golden["config"]).rope
    cos, sin = rope_table(rope, golden["num_positions"])[1].astype(np.float64)
    np.testing.assert_allclose(np.hypot(cos, sin), golden["amplitude"], rtol=1e-6)
    np.testing.assert_allclose(np.arctan2(sin, cos), golden["inverse_frequencies"], rtol=3e-6)


def test_far_positions_are_as_exact_as_near_ones() -> None:
    rope = RopeConfig(theta=10_000.0, rotary_dim=8)
    table = rope_table(rope, 200_000)
    angles = 199_999 * 10_000.0 ** -(np.arange(4) / 4)
    np.testing.assert_allclose(table[-1, 0], np.cos(angles), atol=1e-7)
    np.testing.assert_allclose(table[-1, 1], np.sin(angles), atol=1e-7)


def test_scores_depend_on_distance_alone_and_lengths_are_kept() -> None:
    table = rope_table(RopeConfig(rotary_dim=16), 64)
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 16)).astype(np.float32)

    def at(x: np.ndarray, position: int) -> np.ndarray:
        return rotate(x, table[position : position + 1])[0, 0]

    near, far = at(q, 7) @ at(k, 3), at(q, 57) @ at(k, 53)
    np.testing.assert_allclose(near, far, rtol=1e-5)
    assert abs(near - at(q, 8) @ at(k, 3)) > 1e-3
    np.testing.assert_allclose(np.linalg.norm(at(q, 33)), np.linalg.norm(q), rtol=1e-6)


def test_channels_beyond_the_rotary_part_pass_untouched() -> None:
    table = rope_table(RopeConfig(rotary_dim=4), 8)
    x = np.random.default_rng(0).standard_normal((8, 2, 10)).astype(np.float32)
    out = rotate(x, table)
    np.testing.assert_array_equal(out[..., 4:], x[..., 4:])
    assert not np.allclose(out[1:, :, :4], x[1:, :, :4])


def test_interleaved_pairs_are_half_split_pairs_in_another_order() -> None:
    table = rope_table(RopeConfig(rotary_dim=8), 8)
    x = np.random.default_rng(0).standard_normal((8, 2, 8)).astype(np.float32)
    halves = np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
    np.testing.assert_array_equal(rotate(x, table, interleaved=True), rotate(halves, table))


def test_one_table_serves_every_length_up_to_its_own() -> None:
    """Dynamic and LongRoPE choose by the longest context served, never by the sequence."""
    rope = RopeConfig(rotary_dim=8, scaling="dynamic", factor=2.0, original_max_position=32)
    plain = RopeConfig(rotary_dim=8)
    np.testing.assert_array_equal(rope_table(rope, 32), rope_table(plain, 32))
    assert not np.allclose(rope_table(rope, 64)[:32], rope_table(plain, 32))


def test_longrope_refuses_another_number_of_factors() -> None:
    rope = RopeConfig(rotary_dim=8, scaling="longrope", short_factor=(1.0, 2.0))
    with pytest.raises(ValueError, match="longrope needs 4 factors, got 2"):
        rope_table(rope, 16)


def test_settings_of_transformers_4_and_5_read_alike() -> None:
    old = {"max_position_embeddings": 64, "rope_theta": 7.0, "partial_rotary_factor": 0.5}
    old |= {"rope_scaling": {"type": "linear", "factor": 3.0}}
    new = {
        "max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "linear",
            "factor": 3.0,
            "rope_theta": 7.0,
            "partial_rotary_factor": 0.5,
        },
    }
    assert llama.rope(old, 16) == llama.rope(new, 16)
    assert dataclasses.astuple(llama.rope(old, 16))[:4] == (7.0, 8, "linear", 3.0)
