"""KV read back for strategies."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.reuse.strategy import CanonicalChunks
from tests.reuse.prompts import FIRST, SYSTEM, fresh_llm
from tests.tiny_model import CONFIG, tiny_model


class Noting(CanonicalChunks):
    """Keeps what it reads."""

    def __init__(self):
        self.calls, self.seen = 0, []

    def annotate(self, variant, read):
        self.calls += 1
        self.seen.append(read())


def ids(text):
    return tuple(ord(c) for c in text)


def run(llm):
    while llm.engine.has_work:
        llm.engine.step()


def test_keys_come_without_rotary_positions_and_layer_0_depends_on_the_token_alone():
    llm, noting = fresh_llm(), Noting()
    assert llm.engine.chunks.put(ids(FIRST), ids(SYSTEM), None, noting)
    run(llm)
    k, v = noting.seen[0]
    shape = (CONFIG.num_layers, len(FIRST), CONFIG.num_kv_heads, CONFIG.head_dim)
    assert k.shape == v.shape == shape
    assert k.dtype == v.dtype == np.float32
    model = tiny_model()
    tokens = jnp.array(ids(FIRST))
    _, wanted_k, wanted_v = model.project(0, model.embed(tokens), jnp.zeros(len(tokens), jnp.int32))
    assert wanted_v is not None
    np.testing.assert_allclose(k[0], wanted_k, atol=1e-5)
    np.testing.assert_allclose(v[0], wanted_v, atol=1e-5)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 200])
def test_any_number_of_tokens_is_read(length):
    llm, noting = fresh_llm(), Noting()
    assert llm.engine.chunks.put(ids("ab" * 150)[:length], (), None, noting)
    run(llm)
    k, _ = noting.seen[0]
    assert k.shape[1] == length
    assert np.abs(k).sum(axis=(0, 2, 3)).min() > 0
    np.testing.assert_allclose(k[0, ::2], np.repeat(k[0, :1], -(-length // 2), axis=0), atol=1e-5)


def test_a_variant_stored_for_somebody_else_is_annotated_too_and_so_are_two_waiting_for_one():
    llm, first, second, third = fresh_llm(), Noting(), Noting(), Noting()
    llm.engine.chunks.put(ids(FIRST), (), None, first)
    llm.engine.chunks.put(ids(FIRST), (), None, second)
    run(llm)
    llm.engine.chunks.put(ids(FIRST), (), None, third)
    assert [first.calls, second.calls, third.calls] == [1, 1, 1]
