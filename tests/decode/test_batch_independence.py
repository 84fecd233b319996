"""A row's results do not depend on what is batched with it, to the last bit."""

import jax
import numpy as np
import pytest

from kvjax.decode import DecodeState, RowRequest, load_seat, pack_rows, sample, seat_features
from kvjax.request import SamplingParams

step = jax.jit(sample)
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
    whole = jax.tree.map(np.asarray, step(logits, state, pack_rows(requests, 16, 16))[2])
    for size in (1, 2, 8):
        order = np.random.default_rng(size).permutation(16)
        for start in range(0, 16 - size + 1, size):
            batch = order[start : start + size]
            rows = pack_rows([requests[row] for row in batch], size, 16)
            alone = jax.tree.map(np.asarray, step(logits[batch], state, rows)[2])
            expected = jax.tree.map(lambda leaf, batch=batch: leaf[batch], whole)
            jax.tree.map(np.testing.assert_array_equal, alone, expected)


def test_padding_changes_nothing():
    state, requests = mixed_requests(VOCAB)
    logits = np.random.default_rng(1).standard_normal((16, VOCAB)).astype(np.float32)
    full = step(logits[:8], state, pack_rows(requests[:8], 8, 16))
    logits[8:] = np.nan
    padded = step(logits, state, pack_rows(requests[:8], 16, 16))
    for mine, expected in zip(jax.tree.leaves(padded[2]), jax.tree.leaves(full[2]), strict=True):
        np.testing.assert_array_equal(mine[:8], expected)
    for mine, expected in zip(jax.tree.leaves(padded[1]), jax.tree.leaves(full[1]), strict=True):
        np.testing.assert_array_equal(mine, expected)
