"""Draws one token per logits row, inside the jitted step."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kvjax.decode.randomness import Purpose, gumbel_noise, request_keys
from kvjax.decode.rows import SamplingRows
from kvjax.decode.stages import LOGIT_STAGES, LogitStage, process_logits
from kvjax.decode.state import DecodeState, record_tokens
from kvjax.pallas_kernels import row_sum, steady_exp
from kvjax.request import MAX_LOGPROBS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class SampleOutput:
    """What a step reports per logits row. Rows without `want_logprobs` have NaN and -1 there."""

    tokens: Array  # i32[L]
    healthy: Array  # bool[L] False: the row's logits have NaN or +inf, the token means nothing
    logprobs: Array  # f32[L] of the token, from the raw logits
    ranks: Array  # i32[L] 1 + number of tokens with larger raw logits
    top_ids: Array  # i32[L, 20] most likely first; -1 past the vocabulary
    top_logprobs: Array  # f32[L, 20]


def sample(
    logits: Float[Array, "rows vocab"],
    state: DecodeState,
    rows: SamplingRows,
    stages: Sequence[LogitStage] | None = None,
) -> tuple[Int[Array, " rows"], DecodeState, SampleOutput]:
    """Draws (or takes `forced_tokens`), and appends the active rows' tokens to their seats.

    A row's results are bit-equal whatever other rows there are. Without any random or edited row
    the cost is that of an argmax. `stages=None` is the registered table.
    """
    if logits.ndim != 2 or logits.shape != (rows.seats.shape[0], state.vocab_size):
        raise ValueError(
            f"expected logits [{rows.seats.shape[0]}, {state.vocab_size}], got {logits.shape}"
        )
    stages = tuple(LOGIT_STAGES if stages is None else stages)
    raw = logits.astype(jnp.float32)

    def draw_edited(raw: Array) -> Array:
        return draw_tokens(process_logits(raw, state, rows, stages), rows)

    busy = rows.is_random
    for stage in stages:
        busy = busy | stage.wanted(rows)
    with jax.named_scope("draw"):
        tokens = jax.lax.cond(jnp.any(busy), draw_edited, row_argmax, raw)
        drawn_logits = jnp.take_along_axis(raw, tokens[:, None], axis=1)[:, 0]
    tokens = jnp.where(rows.forced_tokens >= 0, rows.forced_tokens, tokens)
    output = _report(raw, tokens, jnp.isfinite(drawn_logits), rows.want_logprobs)
    return tokens, record_tokens(state, rows, tokens), output


def draw_tokens(
    logits: Float[Array, "rows vocab"], rows: SamplingRows, purpose: Purpose = Purpose.DRAW
) -> Int[Array, " rows"]:
    """Draws from `softmax(logits)` with each row's own key; greedy rows take the argmax.

    `logits` are processed ones (`process_logits`).
    """

    def perturb(logits: Array) -> Array:
        keys = request_keys(rows.seeds, rows.seeds_hi, rows.branches, rows.positions, purpose)
        noise = gumbel_noise(keys, logits.shape[1])
        return jnp.where(rows.is_random[:, None], logits + noise, logits)

    return row_argmax(jax.lax.cond(jnp.any(rows.is_random), perturb, lambda logits: logits, logits))


def row_argmax(logits: Float[Array, "rows vocab"]) -> Int[Array, " rows"]:
    """Index of the maximum; the lowest index wins a tie, a NaN wins over all.

    The same as `jnp.argmax(logits, 1)`, which XLA:CPU computes ten times slower than a maximum.
    """
    top = jnp.max(logits, axis=1, keepdims=True)  # NaN if there is one
    columns = jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :]
    hits = (logits == top) | jnp.isnan(logits)
    return jnp.min(jnp.where(hits, columns, logits.shape[1]), axis=1)


def token_logprobs(
    logits: Float[Array, "rows vocab"], tokens: Int[Array, " rows"]
) -> tuple[Float[Array, " rows"], Int[Array, " rows"], Float[Array, " rows"]]:
    """`log_softmax(logits)` at `tokens`, the tokens' ranks, and each row's log-sum-exp."""
    top = jnp.max(logits, axis=1, keepdims=True)
    log_sum = top[:, 0] + jnp.log(row_sum(steady_exp(logits - top)))
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)
    ranks = 1 + jnp.sum(logits > chosen, axis=1, dtype=jnp.int32)
    return chosen[:, 0] - log_sum, ranks, log_sum


def _report(
    raw: Float[Array, "rows vocab"],
    tokens: Int[Array, " rows"],
    healthy: Bool[Array, " rows"],
    wanted: Bool[Array, " rows"],
) -> SampleOutput:
    num_rows, vocab_size = raw.shape
    width = min(MAX_LOGPROBS, vocab_size)

    def silent(raw: Array) -> tuple[Array, Array, Array, Array]:
        return (
            jnp.full(num_rows, jnp.nan, jnp.float32),
            jnp.full(num_rows, -1, jnp.int32),
            jnp.full((num_rows, MAX_LOGPROBS), -1, jnp.int32),
            jnp.full((num_rows, MAX_LOGPROBS), jnp.nan, jnp.float32),
        )

    def describe(raw: Array) -> tuple[Array, Array, Array, Array]:
        logprobs, ranks, log_sum = token_logprobs(raw, tokens)
        top_logits, top_ids = jax.lax.top_k(raw, width)
        no_logprobs, no_ranks, no_ids, no_tops = silent(raw)
        top_ids = no_ids.at[:, :width].set(top_ids)
        tops = no_tops.at[:, :width].set(top_logits - log_sum[:, None])
        return (
            jnp.where(wanted, logprobs, no_logprobs),
            jnp.where(wanted, ranks, no_ranks),
            jnp.where(wanted[:, None], top_ids, no_ids),
            jnp.where(wanted[:, None], tops, no_tops),
        )

    with jax.named_scope("logprobs"):
        described = jax.lax.cond(jnp.any(wanted), describe, silent, raw)
    return SampleOutput(tokens, healthy, *described)
