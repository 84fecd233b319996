"""A device with too little memory for large steps: the real step, with an allocation too many."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.step import step


class Memory:
    """How large a step may be before the device has no memory for it."""

    tokens, seqs = 32, 4

    def step(self, model: Any, pages: Any, state: Any, batch: Any, *, decode: bool) -> Any:
        """The real step; one that is too large also wants 4 TiB, which the device refuses."""
        pages, state, out = step(model, pages, state, batch, decode=decode)
        if batch.tokens.shape[0] > (self.seqs if decode else self.tokens):
            none, one = jnp.minimum(batch.tokens[0], 0), jnp.ones((1,), jnp.int32)

            def touch(i: Any, held: Any) -> Any:
                return jax.lax.dynamic_update_slice(held, one, (i,))

            held = jax.lax.fori_loop(0, none, touch, jnp.full((2**40,), none))
            out = dataclasses.replace(out, tokens=out.tokens + held[none])
        return pages, state, out
