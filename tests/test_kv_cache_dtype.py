"""An engine over quantised KV: other numbers, the same promises."""

import pytest

from tests.test_engine_exactness import PARAMS, PROMPTS, bits, cold, engine, serve

DTYPES = ["int8", pytest.param("float8_e4m3fn", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kv_cache_dtype", DTYPES)
def test_batched_is_alone_and_warm_is_cold_to_the_bit(kv_cache_dtype):
    """A token's scale is its own, so what is cached is what would be computed again."""
    served = engine("float32", kv_cache_dtype=kv_cache_dtype)
    alone = []
    for prompt, params in zip(PROMPTS, PARAMS, strict=True):
        alone += map(bits, serve(cold(served), [prompt], [params]))
    assert list(map(bits, serve(cold(served), PROMPTS, PARAMS))) == alone
    tree = served[0].scheduler.tree
    assert tree is not None
    before = tree.stats.hit_tokens
    assert list(map(bits, serve(served, PROMPTS, PARAMS))) == alone
    assert tree.stats.hit_tokens > before


@pytest.mark.parametrize("kv_cache_dtype", DTYPES)
def test_it_takes_a_third_of_the_memory_of_float32(kv_cache_dtype):
    """Heads of 64: 64 bytes and a scale of 4, where float32 takes 256."""
    narrow = engine("float32", kv_cache_dtype=kv_cache_dtype)[0].runner
    wide = engine("float32")[0].runner
    assert narrow.spec.page_bytes * 256 == wide.spec.page_bytes * 68
