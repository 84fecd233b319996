"""Rotary embedding: cosine and sine tables in float64 on the host, one rotation on the device.

Su et al., arXiv 2104.09864; the scalings are those that Hugging Face checkpoints rely on.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvjax.models.config import RopeConfig


def rope_table(rope: RopeConfig, num_positions: int) -> np.ndarray:
    """`[num_positions, 2, rotary_dim / 2]` float32: cosines, then sines, of each position.

    "dynamic" and "longrope" choose by length; a cache cannot change its mind as a sequence grows,
    so the choice is made once, for `num_positions`: unscaled (short factors) up to the original
    context length, scaled (long factors) for the whole table beyond it.
    """
    half = rope.rotary_dim // 2
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / rope.rotary_dim
    inverse = 1.0 / rope.theta**exponents
    amplitude = 1.0
    original = rope.original_max_position or num_positions
    match rope.scaling:
        case "none":
            pass
        case "linear":
            inverse = inverse / rope.factor
        case "dynamic":
            if num_positions > original:
                stretch = rope.factor * num_positions / original - (rope.factor - 1)
                theta = rope.theta * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2))
                inverse = 1.0 / theta**exponents
        case "llama3":
            inverse = _llama3(rope, inverse, original)
        case "yarn":
            inverse, amplitude = _yarn(rope, inverse, original)
        case "longrope":
            factors = rope.long_factor if num_positions > original else rope.short_factor
            if len(factors) != half:
                raise ValueError(f"longrope needs {half} factors, got {len(factors)}")
            inverse = inverse / np.asarray(factors)
            amplitude = rope.attention_factor or (
                1.0
                if rope.factor <= 1
                else math.sqrt(1 + math.log(rope.factor) / math.log(original))
            )
    angles = np.arange(num_positions, dtype=np.float64)[:, None] * inverse
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32) * np.float32(
        amplitude
    )


def _llama3(rope: RopeConfig, inverse: np.ndarray, original: int) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    wavelength = 2 * np.pi / inverse
    smooth = (original / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * inverse / rope.factor + smooth * inverse
    scaled = np.where(wavelength > original / rope.low_freq_factor, inverse / rope.factor, blended)
    return np.where(wavelength < original / rope.high_freq_factor, inverse, scaled)


def _yarn(rope: RopeConfig, inverse: np.ndarray, original: int) -> tuple[np.ndarray, float]:
    """YaRN, arXiv 2309.00071, section 3.2 ("NTK-by-parts") and 3.4 (attention temperature)."""

    def channel(rotations: float) -> float:
        turns = original / (rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    ramp = np.clip((np.arange(len(inverse)) - low) / (high - low or 1e-3), 0, 1)
    inverse = inverse / rope.factor * ramp + inverse * (1 - ramp)

    def temperature(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return inverse, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return inverse, temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return inverse, temperature(1.0)


def rotate(
    x: Float[Array, "tokens *heads d"],
    cos_sin: Float[Array, "tokens 2 half"],
    *,
    interleaved: bool = False,
) -> Float[Array, "tokens *heads d"]:
    """Rotates the first `2 * half` channels; the rest pass. Float32.

    Channel i pairs with i + half, or (`interleaved`) 2i with 2i + 1; an interleaved input comes out
    in the half-split order, which scores cannot tell apart when queries and keys share it.
    """
    half = cos_sin.shape[-1]
    per_head = (slice(None), *(None,) * (x.ndim - 2))
    cos, sin = cos_sin[:, 0][per_head], cos_sin[:, 1][per_head]  # [tokens, 1.., half]
    if interleaved:
        a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    else:
        a, b = x[..., :half], x[..., half : 2 * half]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], axis=-1)
