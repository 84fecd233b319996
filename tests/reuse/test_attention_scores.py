"""Scores by attention, on keys made so that the softmax is known."""

import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.pages import KVView
from kvjax.models import ModelConfig
from kvjax.models.config import RopeConfig
from kvjax.pallas_kernels import LayerPages
from kvjax.reuse.scores import SCORES, Layer

HEADS, WIDTH, TOKENS = 4, 64, 20
CHUNKS = ((2, 6), (8, 16))
CONFIG = ModelConfig(
    architecture="llama", vocab_size=8, hidden_size=64, intermediate_size=64, num_layers=1,
    num_heads=HEADS, num_kv_heads=2, head_dim=WIDTH, max_position=64, norm_eps=1e-5,
    rope=RopeConfig(rotary_dim=WIDTH), eos_token_ids=(0,),
)  # fmt: skip


def layer(rows, *, favourite=None, question=(16, TOKENS), value_change=None):
    """Rows of a prompt of 20 tokens whose queries are one and the same; keys are zero but for the
    `favourite`, which gets all the attention of whoever sees it."""
    k = np.zeros((2, 2, 16, WIDTH), np.float32)  # [pages, heads, slots, width]
    if favourite is not None:
        k[favourite // 16, :, favourite % 16] = 10.0
    q = np.ones((len(rows), HEADS, WIDTH), np.float32)
    model: Any = types.SimpleNamespace(
        config=CONFIG, project=lambda *_: (jnp.asarray(q), None, None)
    )
    rows = np.asarray(rows, np.int32)
    view = KVView(
        write_slots=jnp.asarray(rows), visible_lo=jnp.zeros(len(rows), jnp.int32),
        visible_hi=jnp.asarray(rows + 1), block_tables=jnp.array([[0, 1]], jnp.int32),
        kv_lens=jnp.array([TOKENS], jnp.int32),
    )  # fmt: skip
    indices = np.arange(TOKENS)
    old = np.zeros((len(rows), 2, WIDTH), np.float32)
    new = old.copy()
    for row, change in (value_change or {}).items():
        new[list(rows).index(row), 0, 0] = change
        new[list(rows).index(row), 1, 3] = -change
    pages = LayerPages(jnp.asarray(k), jnp.zeros_like(k), None, None)
    return Layer(
        model, 0, pages, view, jnp.zeros((len(rows), 1)), jnp.asarray(rows), jnp.asarray(rows),
        jnp.asarray(indices, jnp.int32), jnp.asarray(indices >= question[0]),
        jnp.asarray(CHUNKS, jnp.int32), (jnp.asarray(old), jnp.asarray(old)),
        (jnp.asarray(old), jnp.asarray(new)),
    )  # fmt: skip


def test_softmax_within_a_chunk_gives_each_chunk_the_whole_attention_of_every_head_and_row():
    scores = np.asarray(SCORES["question_attention_within"](layer([16, 17, 18])))
    wanted = np.zeros(TOKENS)
    wanted[2:6], wanted[8:16] = 3 * HEADS / 4, 3 * HEADS / 8
    np.testing.assert_allclose(scores, wanted, rtol=1e-5)


def test_a_key_that_takes_all_attention_takes_it_from_its_own_chunk_only():
    scores = np.asarray(SCORES["question_attention_within"](layer([16, 17], favourite=4)))
    wanted = np.zeros(TOKENS)
    wanted[4], wanted[8:16] = 2 * HEADS, 2 * HEADS / 8
    np.testing.assert_allclose(scores, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("score", ["question_attention_within", "question_attention"])
def test_rows_that_are_no_question_do_not_count(score):
    with_text = np.asarray(SCORES[score](layer([0, 1, 7, 16, 17])))
    np.testing.assert_allclose(with_text, np.asarray(SCORES[score](layer([16, 17]))), rtol=1e-6)
