"""A row's results do not depend on what is batched with it, to the last bit."""

import jax
import numpy as np
import pytest

from kvjax.decode import (
    DecodeState,
    RowRequest,
    load_seat,
    pack_rows,
    process_logits,
    sample,
    seat_features,
)
from kvjax.request import SamplingParams

step = jax.jit(sample)
process = jax.jit(process_logits)  # a wrong last bit seldom changes a draw: it shows here
VOCAB = 5003  # a multiple of nothing


def mixed_requests(vocab):
    """Sixteen requests that use everything in turn, their seats loaded."""
    rng = np.random.default_rng(vocab)
    state, requests = DecodeState.allocate(16, vocab), []
    for row in range(16):
        params = SamplingParams(
            temperature=[0.0, 1.0, 0.7, 1.9][row % 4],
            top_p=[1.0, 0.9, 0.5][row % 3],
            top_k=[0, 40, 3, 0, 0][row % 5],
            min_p=[0.0, 0.0, 0.02][(row // 2) % 3],
            repetition_penalty=1.2 if row % 6 == 1 else 1.0,
            frequency_penalty=0.3 if row % 7 == 2 else 0.0,
            logit_bias={row: 1.5} if row % 8 == 3 else None,
            logprobs=5 if row % 2 else None,
            bad_words=["x"] if row == 9 else None,
            min_tokens=3 if row % 5 == 0 else 0,
        )
        if params.needs_seat_features:
            prompt, output = rng.integers(0, vocab, (2, 20)).tolist()
            state = load_seat(
                state, row, seat_features(params, vocab, prompt, output, [[output[-1], 4]])
            )
        requests.append(
            RowRequest(
                row, params, seed=row, position=10 + row, branch=row % 3, end_token_ids=(0, 1)
            )
        )
    return state, requests


@pytest.mark.parametrize("vocab", [VOCAB, pytest.param(1003, marks=pytest.mark.slow)])
def test_every_result_of_a_row_is_bit_equal_in_every_batch(vocab):
    state, requests = mixed_requests(vocab)
    logits = np.random.default_rng(1).standard_normal((16, vocab)).astype(np.float32) * 3

    def results(batch):
        rows = pack_rows([requests[row] for row in batch], len(batch), 16)
        args = logits[batch], state, rows
        return jax.tree.map(np.asarray, (step(*args)[2], process(*args)))

    halves = results(np.arange(8)), results(np.arange(8, 16))
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *halves)
    for size in (1, 2, 8):
        order = np.random.default_rng(size).permutation(16)
        for start in range(0, 16 - size + 1, size):
            batch = order[start : start + size]
            expected = jax.tree.map(lambda leaf, batch=batch: leaf[batch], whole)
            jax.tree.map(np.testing.assert_array_equal, results(batch), expected)


def test_padding_changes_nothing():
    state, requests = mixed_requests(VOCAB)
    logits = np.random.default_rng(1).standard_normal((8, VOCAB)).astype(np.float32)
    logits[2:] = np.nan
    few = [requests[3], requests[9]]
    _, full_state, full = step(logits[:2], state, pack_rows(few, 2, 16))
    _, padded_state, padded = step(logits, state, pack_rows(few, 8, 16))
    jax.tree.map(lambda mine, other: np.testing.assert_array_equal(mine[:2], other), padded, full)
    jax.tree.map(np.testing.assert_array_equal, padded_state, full_state)
