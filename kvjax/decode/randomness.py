"""Random numbers that belong to a request: batch mates and preemption cannot change them."""

import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt


class Purpose(enum.IntEnum):
    """What a random number is for. Part of its key, so that one position can have several."""

    DRAW = 0
    DRAFT = 1
    ACCEPT = 2
    RESAMPLE = 3
    DENOISE = 4


def request_keys(
    seeds: UInt[Array, " rows"],  # lower 32 bits
    seeds_hi: UInt[Array, " rows"],  # upper 32 bits
    branches: Int[Array, " rows"],
    positions: Int[Array, " rows"],  # sequence index of the token that is being drawn
    purpose: Purpose = Purpose.DRAW,
) -> Key[Array, " rows"]:
    """`fold_in(fold_in(fold_in(key(seed), branch), position), purpose)` for each row.

    The generator is threefry whatever `jax_default_prng_impl` says.
    """

    def one(seed: Array, seed_hi: Array, branch: Array, position: Array) -> Array:
        key = jax.random.wrap_key_data(jnp.stack([seed_hi, seed]), impl="threefry2x32")
        key = jax.random.fold_in(key, branch.astype(jnp.uint32))
        key = jax.random.fold_in(key, position.astype(jnp.uint32))
        return jax.random.fold_in(key, int(purpose))

    return jax.vmap(one)(seeds, seeds_hi, branches, positions)


def gumbel_noise(keys: Key[Array, " rows"], size: int) -> Float[Array, "rows size"]:
    """Standard Gumbel noise, `size` values per key, with all 32 random bits in the upper tail.

    `argmax(logits + noise)` is a draw from `softmax(logits)`. (`jax.random.gumbel` has 23 bits:
    it cannot exceed 16, which is felt with 10^5 tokens.)
    """
    bits = jax.vmap(lambda key: jax.random.bits(key, (size,), jnp.uint32))(keys)
    uniform = (bits.astype(jnp.float32) + 0.5) * 2.0**-32
    uniform = jnp.minimum(uniform, 1 - 2.0**-24)  # rounding can reach 1, and log1p(-1) is -inf
    return -jnp.log(-jnp.log1p(-uniform))
