"""What the device remembers per seat between steps: last tokens, counts, biases, masks."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from kvjax.decode.rows import SamplingRows
from kvjax.request import SamplingParams

NUM_BAD_WORDS = 32  # token sequences per request
BAD_WORD_TOKENS = 8  # longest sequence


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class DecodeState:
    """Per-seat state. Donated to, and returned by, every step; the last row is for padding.

    A seat's features (and its mask, `grammar`) are read only for rows which say that they use
    them, so what an earlier request left in a seat does no harm: only requests with
    `needs_seat_features` need `load_seat`.
    """

    last_tokens: Array  # i32[seats + 1]
    output_counts: Array  # i32[seats + 1, V]
    prompt_mask: Array  # bool[seats + 1, V]
    bias: Array  # f32[seats + 1, V] logit_bias; -inf for tokens that are not allowed
    grammar: Array  # i32[seats + 1, ceil(V / 32)] bits of the tokens that may come (`load_masks`)
    bad_words: Array  # i32[seats + 1, NUM_BAD_WORDS, BAD_WORD_TOKENS] right-aligned, -1: none
    history: Array  # i32[seats + 1, BAD_WORD_TOKENS - 1] last output tokens, newest last, -1: none

    @property
    def num_seats(self) -> int:
        """Seats, not counting the one for padding."""
        return self.last_tokens.shape[0] - 1

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.bias.shape[1]

    @staticmethod
    def abstract(num_seats: int, vocab_size: int) -> "DecodeState":
        """Shapes and dtypes only: to size or shard the state before it exists."""
        return jax.eval_shape(partial(_empty_state, num_seats + 1, vocab_size))

    @staticmethod
    def allocate(num_seats: int, vocab_size: int) -> "DecodeState":
        """A state in which every seat is clear."""
        return jax.jit(_empty_state, static_argnums=(0, 1))(num_seats + 1, vocab_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class SeatFeatures:
    """One seat of `DecodeState` but its last token and mask. Built by `seat_features`."""

    output_counts: Array | np.ndarray  # i32[V]
    prompt_mask: Array | np.ndarray  # bool[V]
    bias: Array | np.ndarray  # f32[V]
    bad_words: Array | np.ndarray  # i32[NUM_BAD_WORDS, BAD_WORD_TOKENS]
    history: Array | np.ndarray  # i32[BAD_WORD_TOKENS - 1]


def seat_features(
    params: SamplingParams,
    vocab_size: int,
    prompt_ids: Sequence[int] = (),
    output_ids: Sequence[int] = (),
    bad_word_ids: Sequence[Sequence[int]] = (),
) -> SeatFeatures:
    """What `load_seat` writes for a request: of its prompt, its output so far and its bad words.

    `bad_word_ids` are the token sequences of `params.bad_words` (several per word if the tokenizer
    has several, as with and without a leading space). Raises `ValueError` if they are too many or
    too long. Costs O(vocab_size) numpy work.
    """
    if len(bad_word_ids) > NUM_BAD_WORDS:
        raise ValueError(
            f"bad_words must give at most {NUM_BAD_WORDS} token sequences, got {len(bad_word_ids)}"
        )
    bad_words = np.full((NUM_BAD_WORDS, BAD_WORD_TOKENS), -1, np.int32)
    for row, word in enumerate(bad_word_ids):
        if not 1 <= len(word) <= BAD_WORD_TOKENS:
            raise ValueError(
                f"bad_words must be of 1 to {BAD_WORD_TOKENS} tokens, got {len(word)}: {list(word)}"
            )
        bad_words[row, BAD_WORD_TOKENS - len(word) :] = word
    bias = np.zeros(vocab_size, np.float32)
    if params.allowed_token_ids is not None:
        bias[:] = -np.inf
        bias[list(params.allowed_token_ids)] = 0
    for token_id, number in (params.logit_bias or {}).items():
        bias[token_id] += number
    prompt_mask = np.zeros(vocab_size, np.bool_)
    prompt_mask[np.asarray(prompt_ids, np.int64)] = True
    history = np.full(BAD_WORD_TOKENS - 1, -1, np.int32)
    recent = list(output_ids)[-len(history) :]
    history[len(history) - len(recent) :] = recent
    counts = np.bincount(np.asarray(output_ids, np.int64), minlength=vocab_size)
    return SeatFeatures(counts.astype(np.int32), prompt_mask, bias, bad_words, history)


@partial(jax.jit, donate_argnames="state")
def load_seat(
    state: DecodeState, seat: Int[Array, ""] | int, features: SeatFeatures
) -> DecodeState:
    """Writes a seat's features before the request's first draw there. Consumes `state`."""
    return dataclasses.replace(
        state,
        output_counts=state.output_counts.at[seat].set(features.output_counts),
        prompt_mask=state.prompt_mask.at[seat].set(features.prompt_mask),
        bias=state.bias.at[seat].set(features.bias),
        bad_words=state.bad_words.at[seat].set(features.bad_words),
        history=state.history.at[seat].set(features.history),
    )


@partial(jax.jit, donate_argnames="state")
def load_masks(
    state: DecodeState, seats: Int[Array, " rows"], masks: Int[Array, "rows words"]
) -> DecodeState:
    """Writes what these seats may draw next; padding has a seat past all. Consumes `state`."""
    return dataclasses.replace(state, grammar=state.grammar.at[seats].set(masks, mode="drop"))


def record_tokens(
    state: DecodeState, rows: SamplingRows, tokens: Int[Array, " rows"]
) -> DecodeState:
    """Appends the active rows' tokens to their seats. In place if `state` is donated."""
    nowhere = state.num_seats + 1  # one past the end, so mode="drop" drops it
    seats = jnp.where(rows.active, rows.seats, nowhere)
    counted = jnp.where(rows.active & rows.uses_penalties, rows.seats, nowhere)
    shifted = jnp.concatenate([state.history[rows.seats, 1:], tokens[:, None]], axis=1)
    return dataclasses.replace(
        state,
        last_tokens=state.last_tokens.at[seats].set(tokens, mode="drop"),
        output_counts=state.output_counts.at[counted, tokens].add(1, mode="drop"),
        history=state.history.at[seats].set(shifted, mode="drop"),
    )


def _empty_state(num_rows: int, vocab_size: int) -> DecodeState:
    return DecodeState(
        last_tokens=jnp.zeros(num_rows, jnp.int32),
        output_counts=jnp.zeros((num_rows, vocab_size), jnp.int32),
        prompt_mask=jnp.zeros((num_rows, vocab_size), jnp.bool_),
        bias=jnp.zeros((num_rows, vocab_size), jnp.float32),
        grammar=jnp.full((num_rows, -(-vocab_size // 32)), -1, jnp.int32),
        bad_words=jnp.full((num_rows, NUM_BAD_WORDS, BAD_WORD_TOKENS), -1, jnp.int32),
        history=jnp.full((num_rows, BAD_WORD_TOKENS - 1), -1, jnp.int32),
    )
