"""Bytes are counted from a compiled text: where arrays lie, and how much of a pool is met."""

import pytest

from tests.aot.cuda_target import xla_bytes
from tests.aot.hbm_bytes import argument_bytes, array_bytes, hbm_bytes, kept_bytes

TPU = """HloModule jit_write

%fused (p: bf16[8,8,128]) -> bf16[8,8,128] {
  ROOT %p = bf16[8,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
}

ENTRY %main (pool: bf16[64,8,64,256], k: bf16[8,3,64]) -> bf16[64,8,64,256] {
  %pool = bf16[64,8,64,256]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[8,3,64]{2,1,0:T(4,128)(2,1)} parameter(1)
  %c = s32[]{:T(128)} constant(1)
  %packed = bf16[8,8,128]{2,1,0:T(8,128)(2,1)S(1)} fusion(%k), kind=kLoop, calls=%fused
  %turned = bf16[8,8,128]{2,1,0:T(8,128)(2,1)S(1)} copy(%packed)
  ROOT %store = bf16[64,8,64,256]{3,2,1,0:T(8,128)(2,1)} custom-call(%c, %turned, %pool), \
custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"bytes_accessed":"50000"}}
}
"""
K_BYTES, ROW_BYTES = 8 * 4 * 128 * 2, 8 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("array", "size", "in_hbm"),
    [
        (("bf16", "8,3,64", "2,1,0:T(4,128)(2,1)"), 8 * 4 * 128 * 2, True),
        (("s32", "1000", "0:T(1024)S(1)"), 4096, False),
        (("u8", "5,7", "1,0"), 35, True),
        (("f32", "", ":T(128)"), 4, True),
        (("bf16", "3,16,64", "2,0,1:T(8,128)(2,1)"), 16 * 8 * 128 * 2, True),
    ],
    ids=str,
)
def test_an_array_has_the_bytes_of_its_tiles_in_the_order_of_its_layout(array, size, in_hbm):
    assert array_bytes(*array) == (size, in_hbm)


def test_what_lies_in_vmem_is_not_counted_and_a_kernel_counts_for_what_is_left():
    assert argument_bytes(TPU) == [64 * 8 * 64 * 256 * 2, K_BYTES]
    assert hbm_bytes(TPU) == K_BYTES + (50000 - ROW_BYTES)


def test_a_copy_that_goes_to_hbm_is_counted():
    spilled = TPU.replace("S(1)} copy", "} copy")
    assert hbm_bytes(spilled) == K_BYTES + ROW_BYTES + 50000
    assert kept_bytes(spilled) == 2 * ROW_BYTES  # written, and read by the kernel
    assert kept_bytes(TPU) == 0


def test_a_loop_has_no_bytes_that_could_be_counted():
    loop = TPU.replace("copy(%packed)", "while(%packed)")
    with pytest.raises(ValueError, match="while turned"):
        hbm_bytes(loop)


GPU = """HloModule jit_move

ENTRY %main (pool: u16[64,8,64,128], slots: s32[16]) -> u16[64,8,64,128] {
  %pool = u16[64,8,64,128]{3,2,1,0} parameter(0)
  %slots = s32[16]{0} parameter(1)
  %rows = u16[16,8,128]{2,1,0} fusion(%pool, %slots), kind=kLoop, calls=%gather
  %found = (s32[], s32[16]{0}) while(%slots), body=%b, \
backend_config={"known_trip_count":{"n":"5"}}
  %kernel = f32[16]{0} custom-call(%pool, %slots), custom_call_target="mosaic_gpu_v2"
  ROOT %new = u16[64,8,64,128]{3,2,1,0} fusion(%pool, %rows, %slots), kind=kInput, calls=%scatter
}
"""


def test_a_pool_counts_for_the_rows_that_are_read_from_it_or_written_to_it():
    rows, slots = 16 * 8 * 128 * 2, 16 * 4
    gathered = slots + 2 * rows
    scattered = slots + 2 * rows
    loop = 5 * (slots + 4 + slots)
    assert xla_bytes(GPU, {64 * 8 * 64 * 128 * 2}) == gathered + scattered + loop


def test_a_copy_of_a_pool_that_is_not_known_as_one_is_counted_whole():
    assert (xla_bytes(GPU, set()) or 0) > 64 * 8 * 64 * 128 * 2


def test_a_loop_over_more_than_indices_has_no_bytes():
    assert (
        xla_bytes(GPU.replace("s32[16]{0} parameter", "s32[1600000]{0} parameter"), set()) is None
    )
