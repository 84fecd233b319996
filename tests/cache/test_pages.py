"""KV on the device: what a spec says it takes is what is allocated, in every dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.pages import STORAGE, KVGroup, KVPages, KVSpec, storage_dtype
from kvjax.config import KV_CACHE_DTYPES, EngineConfig


def spec(dtype: str) -> KVSpec:
    """A full and a sliding group of different heads, and a latent one."""
    groups = (
        KVGroup(kind="full", layers=(0, 3), num_kv_heads=3, k_width=64, v_width=64, dtype=dtype),
        KVGroup(kind="sliding", layers=(1,), num_kv_heads=2, k_width=80, v_width=48, dtype=dtype,
                window=32),
        KVGroup(kind="latent", layers=(2,), num_kv_heads=1, k_width=40, v_width=0, dtype=dtype),
    )  # fmt: skip
    return KVSpec(groups=groups, page_size=16)


@pytest.mark.parametrize("dtype", STORAGE)
def test_bytes_are_those_of_the_arrays_scales_included(dtype):
    pages = KVPages.allocate(spec(dtype), num_pages=5)
    arrays = jax.tree.leaves(pages)
    assert sum(x.nbytes for x in arrays) == spec(dtype).bytes(5 * 16) == 5 * spec(dtype).page_bytes
    assert {x.dtype for x in arrays} <= {storage_dtype(dtype), np.dtype(np.float32)}


def test_one_byte_pages_take_their_numbers_and_four_bytes_per_slot_and_head():
    numbers = 2 * 3 * (64 + 64) + 2 * (80 + 48) + 40
    heads = 2 * 3 * 2 + 2 * 2 + 1  # a scale for each key and each value
    for dtype in ("int8", "float8_e4m3fn"):
        assert spec(dtype).bytes(1) == numbers + 4 * heads
    assert spec("bfloat16").bytes(1) == 2 * numbers


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_copied_pages_take_their_scales_along(dtype):
    pages = KVPages.allocate(spec(dtype), num_pages=4)
    marked = jax.tree.map(lambda x: jnp.zeros_like(x).at[1].set(3), pages)
    copied = marked.copied(np.array([1, 0], np.int32), np.array([2, -1], np.int32))
    for x in jax.tree.leaves(copied):
        np.testing.assert_array_equal(np.asarray(x)[2], 3)
        np.testing.assert_array_equal(np.asarray(x)[3], 0)


def test_the_engine_offers_the_dtypes_that_pages_have():
    assert set(KV_CACHE_DTYPES) == {"auto", *STORAGE}
    assert EngineConfig(dtype="float32").kv_dtype == "float32"
    assert EngineConfig(dtype="int8").kv_dtype == "bfloat16"
    assert EngineConfig(kv_cache_dtype="int8").kv_dtype == "int8"
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of"):
        EngineConfig(kv_cache_dtype="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="KV dtype must be one of"):
        storage_dtype("int4")
