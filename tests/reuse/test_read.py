"""Stored KV read as numbers: independent of where it was computed, and only of what is there."""

import numpy as np
import pytest

from kvjax import LLM
from kvjax.cache.chunks import Variant, VariantKey, tokens_hash
from kvjax.errors import UnknownChunk
from kvjax.reuse.strategy import context_hash
from tests.tiny_model import CONFIG, tiny

TOKENS = tuple(map(ord, "packmyboxwithfivedozenliquorjugs"))
CONTEXT = tuple(map(ord, "thequickbrownfox"))[:13]  # ends inside a page


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny(LLM, fresh=True, num_pages=64, max_model_len=256)


def variant(llm: LLM, tokens: tuple[int, ...], context: tuple[int, ...] = ()) -> Variant:
    assert llm.engine.chunks.put(tokens, context)
    while llm.engine.has_work:
        llm.engine.step()
    found = llm.engine.chunks.store.get(
        VariantKey(None, tokens_hash(tokens), context_hash(context))
    )
    assert found is not None
    return found


def test_layer_0_reads_the_same_behind_any_context(llm):
    """There KV depends on token and position alone, and keys are turned back to 0."""
    (k, v), (k2, v2) = (llm.engine.chunks.read(variant(llm, TOKENS, c)) for c in ((), CONTEXT))
    assert k.shape == v.shape == (2, len(TOKENS), CONFIG.num_kv_heads, CONFIG.head_dim)
    assert k.dtype == np.float32
    np.testing.assert_allclose(k2[0], k[0], atol=2e-5)
    np.testing.assert_array_equal(v2[0], v[0])
    assert np.abs(k2[1] - k[1]).max() > 0.01
    assert np.abs(v2[1] - v[1]).max() > 0.01


def test_reading_is_the_same_twice_and_compiles_once_per_size(llm):
    stored = variant(llm, TOKENS)
    first = llm.engine.chunks.read(stored)
    compiles = llm.engine.runner.compiles
    again = llm.engine.chunks.read(stored)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert llm.engine.runner.compiles == compiles


def test_a_variant_that_left_the_store_cannot_be_read(llm):
    stored = variant(llm, TOKENS[:5])
    llm.engine.chunks.store.discard(stored)
    with pytest.raises(UnknownChunk, match="no KV is stored"):
        llm.engine.chunks.read(stored)
