"""Seats: what a step records, what the host loads and clears, and that it happens in place."""

import jax
import numpy as np
import pytest

from kvjax.decode import (
    BAD_WORD_TOKENS,
    NUM_BAD_WORDS,
    NUM_STOP_IDS,
    DecodeState,
    RowRequest,
    load_seat,
    pack_rows,
    record_tokens,
    sample,
    seat_features,
)
from kvjax.request import SamplingParams

VOCAB, SEATS = 11, 3
PENALISED = SamplingParams(temperature=0, presence_penalty=1)
PLAIN = SamplingParams(temperature=0)
record = jax.jit(record_tokens, donate_argnums=0)


def fresh():
    return DecodeState.allocate(SEATS, VOCAB)


def host(state):
    return jax.tree.map(np.asarray, state)


def test_only_active_rows_are_recorded_and_only_penalised_ones_counted():
    rows = pack_rows(
        [
            RowRequest(0, PENALISED, seed=0, position=0),
            RowRequest(1, PLAIN, seed=0, position=0),
            RowRequest(2, PENALISED, seed=0, position=0, active=False),
        ],
        5,
        SEATS,
    )
    before = host(fresh())
    after = host(record(fresh(), rows, np.asarray([4, 5, 6, 7, 8], np.int32)))
    assert after.last_tokens.tolist() == [4, 5, 0, 0]
    expected = np.zeros((SEATS + 1, VOCAB), np.int32)
    expected[0, 4] = 1
    np.testing.assert_array_equal(after.output_counts, expected)
    assert after.history[:, -1].tolist() == [4, 5, -1, -1]
    for name in ("prompt_mask", "bias", "bad_words"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


def test_recording_token_by_token_equals_loading_the_whole_output():
    output = [1, 2, 2, 3, 9, 9, 9, 1, 0, 4]
    state = load_seat(fresh(), 1, seat_features(PENALISED, VOCAB, [7, 7]))
    rows = pack_rows([RowRequest(1, PENALISED, seed=0, position=0)], 1, SEATS)
    for token in output:
        state = record(state, rows, np.asarray([token], np.int32))
    resumed = load_seat(fresh(), 1, seat_features(PENALISED, VOCAB, [7, 7], output))
    mine, expected = host(state), host(resumed)
    assert mine.last_tokens[1] == 4
    for name in ("output_counts", "prompt_mask", "bias", "bad_words", "history"):
        np.testing.assert_array_equal(getattr(mine, name), getattr(expected, name))


def test_loading_replaces_what_one_seat_held_and_touches_no_other():
    params = SamplingParams(
        temperature=0, logit_bias={3: 2.0}, allowed_token_ids=[3, 4], bad_words=["x"]
    )
    features = seat_features(params, VOCAB, [1, 2], [3, 3], [[5, 6]])
    state = load_seat(load_seat(fresh(), 0, features), 2, features)
    state = load_seat(state, 2, seat_features(PENALISED, VOCAB))
    mine = host(state)
    assert mine.bias[0].tolist() == [-np.inf] * 3 + [2.0, 0.0] + [-np.inf] * 6
    assert mine.output_counts[0, 3] == 2
    assert mine.bad_words[0, 0, -3:].tolist() == [-1, 5, 6]
    plain = host(load_seat(fresh(), 2, seat_features(PENALISED, VOCAB)))
    assert (mine.output_counts[2] == plain.output_counts[2]).all()
    assert (mine.bias[2] == plain.bias[2]).all()
    assert (mine.bias[1] == host(fresh()).bias[1]).all()


def test_a_step_and_a_load_update_the_state_in_place():
    seats, vocab = 255, 2048
    state = DecodeState.abstract(seats, vocab)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    rows = pack_rows([], 2, seats)
    logits = jax.ShapeDtypeStruct((2, vocab), np.float32)
    step = jax.jit(sample, donate_argnums=1).lower(logits, state, rows).compile()
    loading = load_seat.lower(state, 0, seat_features(PLAIN, vocab)).compile()
    for compiled in (step, loading):
        memory = compiled.memory_analysis()
        assert memory is not None
        assert memory.alias_size_in_bytes >= size
        assert memory.temp_size_in_bytes < 0.1 * size  # a copied array would be 0.2 at least


def test_abstract_state_has_the_shapes_of_the_allocated_one():
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), DecodeState.abstract(SEATS, VOCAB))
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), fresh())
    assert (fresh().num_seats, fresh().vocab_size) == (SEATS, VOCAB)


def test_what_does_not_fit_the_state_is_refused_with_the_limit():
    with pytest.raises(ValueError, match=f"at most {NUM_BAD_WORDS} token sequences, got 33"):
        seat_features(PLAIN, VOCAB, bad_word_ids=[[1]] * (NUM_BAD_WORDS + 1))
    with pytest.raises(ValueError, match=f"1 to {BAD_WORD_TOKENS} tokens, got 9"):
        seat_features(PLAIN, VOCAB, bad_word_ids=[[1] * (BAD_WORD_TOKENS + 1)])
    with pytest.raises(ValueError, match="1 to 8 tokens, got 0"):
        seat_features(PLAIN, VOCAB, bad_word_ids=[[]])
    with pytest.raises(ValueError, match="2 logits rows do not fit a step of 1"):
        pack_rows([RowRequest(0, PLAIN, seed=0, position=0)] * 2, 1, SEATS)
    ends = tuple(range(NUM_STOP_IDS + 1))
    waits = SamplingParams(min_tokens=1)
    with pytest.raises(ValueError, match=f"can ban {NUM_STOP_IDS} ids, got 33"):
        pack_rows([RowRequest(0, waits, seed=0, position=0, end_token_ids=ends)], 1, SEATS)
