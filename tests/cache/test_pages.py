"""KV on the device: what a spec says it takes is what is allocated, in every dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.pages import STORAGE, KVGroup, KVPages, KVSpec, PageLayout, storage_dtype
from kvjax.config import KV_CACHE_DTYPES, EngineConfig
from kvjax.pallas_kernels import LayerPages, PackedPages, pack_pages


def spec(dtype: str, layout: PageLayout = "split", page_size: int = 16) -> KVSpec:
    """A full and a sliding group of different heads, and a latent one."""
    groups = (
        KVGroup(kind="full", layers=(0, 3), num_kv_heads=3, k_width=64, v_width=64, dtype=dtype),
        KVGroup(kind="sliding", layers=(1,), num_kv_heads=2, k_width=80, v_width=48, dtype=dtype,
                window=32),
        KVGroup(kind="latent", layers=(2,), num_kv_heads=1, k_width=40, v_width=0, dtype=dtype),
    )  # fmt: skip
    return KVSpec(groups=groups, page_size=page_size, layout=layout)


@pytest.mark.parametrize("page_size", [16, 256])
@pytest.mark.parametrize("layout", ["split", "packed"])
@pytest.mark.parametrize("dtype", STORAGE)
def test_bytes_are_those_of_the_arrays_scales_included(dtype, layout, page_size):
    kept = spec(dtype, layout, page_size)
    arrays = jax.tree.leaves(KVPages.allocate(kept, num_pages=5))
    assert sum(x.nbytes for x in arrays) == kept.bytes(5 * page_size) == 5 * kept.page_bytes
    assert {x.dtype for x in arrays} <= {storage_dtype(dtype), np.dtype(np.float32)}


def test_one_byte_pages_take_their_numbers_and_four_bytes_per_slot_and_head():
    numbers = 2 * 3 * (64 + 64) + 2 * (80 + 48) + 40
    heads = 2 * 3 * 2 + 2 * 2 + 1  # a scale for each key and each value
    for dtype in ("int8", "float8_e4m3fn"):
        assert spec(dtype).bytes(1) == numbers + 4 * heads
    assert spec("bfloat16").bytes(1) == 2 * numbers


def test_packed_pages_are_what_packing_makes_of_split_ones():
    for dtype in ("bfloat16", "int8"):
        split = KVPages.abstract(spec(dtype), num_pages=3).layers
        packed = KVPages.abstract(spec(dtype, "packed"), num_pages=3).layers
        for a, b in zip(split, packed, strict=True):
            assert isinstance(a, LayerPages)
            want = jax.eval_shape(pack_pages, a)
            assert [(x.shape, x.dtype) for x in jax.tree.leaves(b)] == [
                (x.shape, x.dtype) for x in jax.tree.leaves(want)
            ]


def test_heads_on_several_devices_are_packed_apart():
    """Each device's rows of scales are whole: three heads are six rows, padded to eight."""
    group = KVGroup(kind="full", layers=(0,), num_kv_heads=12, k_width=64, v_width=64, dtype="int8")
    one, four = (group.page_shapes(5, 16, "packed", shards) for shards in (1, 4))
    assert isinstance(one, PackedPages)
    assert isinstance(four, PackedPages)
    assert one.scale is not None
    assert four.scale is not None
    assert (one.kv.shape, one.scale.shape) == ((5, 12, 16, 128), (5, 24, 128))
    assert (four.kv.shape, four.scale.shape) == ((5, 12, 16, 128), (5, 4 * 8, 128))


@pytest.mark.parametrize("layout", ["split", "packed"])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_copied_pages_take_their_scales_along(dtype, layout):
    pages = KVPages.allocate(spec(dtype, layout), num_pages=4)
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
