"""top_k, top_p and min_p without sorting the vocabulary: each row's exact threshold is searched."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.pallas_kernels import row_sum, steady_exp


def keep_min_p(
    logits: Float[Array, "rows vocab"], min_p: Float[Array, " rows"]
) -> Float[Array, "rows vocab"]:
    """Keeps tokens at least `min_p` times as likely as the most likely one; others get -inf."""
    unlikely = steady_exp(logits - _finite_max(logits)) < min_p[:, None]
    return jnp.where(unlikely, -jnp.inf, logits)


def keep_top_k(
    logits: Float[Array, "rows vocab"], top_k: Int[Array, " rows"], wanted: Bool[Array, " rows"]
) -> Float[Array, "rows vocab"]:
    """Keeps each row's `top_k` largest logits and all that tie with the last of them."""

    def enough(threshold: Array) -> Array:
        return jnp.sum(logits >= threshold[:, None], axis=1, dtype=jnp.int32) >= top_k

    return _keep_from(logits, _largest_threshold(logits, enough, wanted))


def keep_top_p(
    logits: Float[Array, "rows vocab"], top_p: Float[Array, " rows"], wanted: Bool[Array, " rows"]
) -> Float[Array, "rows vocab"]:
    """Keeps the smallest set of most likely tokens whose probability reaches `top_p`, with ties.

    Exact up to the rounding of the sum (about 1e-6 of the whole).
    """
    weights = steady_exp(logits - _finite_max(logits))
    target = top_p * row_sum(weights)

    def enough(threshold: Array) -> Array:
        return row_sum(jnp.where(logits >= threshold[:, None], weights, 0)) >= target

    return _keep_from(logits, _largest_threshold(logits, enough, wanted))


def _largest_threshold(
    logits: Float[Array, "rows vocab"],
    enough: Callable[[Float[Array, " rows"]], Bool[Array, " rows"]],
    wanted: Bool[Array, " rows"],
) -> Float[Array, " rows"]:
    """The largest logit t of each row for which the set {logits >= t} is enough.

    `enough` must be monotone; if even the whole row is not enough, the whole row is kept. Bisects
    values, but both ends always are logits of the row, so the search ends at one logit exactly:
    about 8 rounds where the tail is sparse, 20 in the densest part of 50 000 tokens.
    """
    finite = jnp.isfinite(logits)
    low = jnp.min(jnp.where(finite, logits, jnp.inf), axis=1)
    high = jnp.max(jnp.where(finite, logits, -jnp.inf), axis=1)
    low = jnp.where(wanted, low, high)  # rows that do not ask must not prolong the search

    def searching(ends: tuple[Array, Array]) -> Array:
        low, high = ends
        return jnp.any(low < high)

    def halve(ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends  # answer in [low, high], both logits of the row
        middle = low * 0.5 + high * 0.5
        middle = jnp.where(middle > low, middle, high)  # (low, high]: one end moves in any case
        up = enough(middle)
        beyond = logits >= middle[:, None]
        # The next end is the logit nearest to `middle`, upwards or downwards.
        towards = jnp.where(
            up[:, None],
            jnp.where(beyond, logits, jnp.inf),
            jnp.where(beyond, jnp.inf, -logits),
        )
        nearest = jnp.min(towards, axis=1)
        open_ = low < high
        return jnp.where(open_ & up, nearest, low), jnp.where(open_ & ~up, -nearest, high)

    low, _ = jax.lax.while_loop(searching, halve, (low, high))
    return low


def _keep_from(
    logits: Float[Array, "rows vocab"], threshold: Float[Array, " rows"]
) -> Float[Array, "rows vocab"]:
    return jnp.where(logits < threshold[:, None], -jnp.inf, logits)  # keeps NaN: it must be seen


def _finite_max(logits: Float[Array, "rows vocab"]) -> Float[Array, "rows 1"]:
    """The row's maximum, 0 for a row of -inf only, so that a difference is never NaN for it."""
    top = jnp.max(logits, axis=1, keepdims=True)
    return jnp.where(top == -jnp.inf, 0, top)
