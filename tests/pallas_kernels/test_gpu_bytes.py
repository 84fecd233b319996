"""What the Mosaic GPU kernels copy, counted copy by copy in the interpreter.

CUDA's compiler counts no bytes. These kernels touch memory through TMA only, and the interpreter
does every copy: together they are the bytes that `tests.gpu_bytes` says, which bounds programs for
real contexts in `tests/aot/cuda.py`, and of attention they are within 1.2 times what the task needs
already here. Of DeepSeek's shape only the ratio of heads is the model's: the interpreter leaves
XLA:CPU no threads for widths of 576.
"""

import math
from typing import Any

import jax
import numpy as np
import pytest

from kvjax.pallas_kernels import LayerPages, rotary_tables
from kvjax.pallas_kernels.compat import interpret_gpu
from kvjax.pallas_kernels.page_ops import gpu as copies
from kvjax.pallas_kernels.reposition import gpu as shifts
from tests.gpu_bytes import recorded
from tests.pallas_kernels import test_gpu_attention, test_gpu_mass
from tests.pallas_kernels.attention_cases import Heads, problem
from tests.pallas_kernels.gpu_devices import INTERPRETED

pytestmark = [
    INTERPRETED,
    pytest.mark.skipif(
        jax.__version_info__ < (0, 12), reason="the interpreter of this jax has other copies"
    ),
]
SHAPES = {  # one KV head of each: all of them do the same
    "SmolLM2": (Heads(3, 1, 64), np.uint16),
    "Llama-3-8B": (Heads(4, 1, 128), np.uint16),
    "Llama-3-8B, int8": (Heads(4, 1, 128), np.int8),
    "Gemma 3": (Heads(2, 1, 256), np.uint16),
    "DeepSeek": (Heads(128, 1, 192, 128), np.uint16),
}


@pytest.fixture
def copied(monkeypatch):
    """A list of the bytes of each copy between global and shared memory."""
    from jax._src.pallas.mosaic_gpu.interpret import shared_memory

    sizes: list[int] = []
    memory: Any = shared_memory.GPUSharedMemory
    execute = memory.execute_async_task

    def counting(self, task: Any) -> Any:
        dtype = self.buffer_shape_and_dtype(task.src_allocation_key).dtype
        sizes.append(math.prod(task.src_access.shape) * np.dtype(dtype).itemsize)
        return execute(self, task)

    monkeypatch.setattr(memory, "execute_async_task", counting)
    return sizes


def _problem(name: str, seqs: int, tokens: int):
    """Every token of every sequence sees all of its 512 keys."""
    heads, physical = SHAPES[name]
    return problem(
        1, heads, [(512, [(0, 512)] * tokens)] * seqs, page_size=64, pages_per_seq=8,
        physical=physical,
    )  # fmt: skip


def _needed(p, calls) -> int:
    """Keys (and values) once per tile, queries once, results once."""
    tokens, q_heads, width = p.q.shape
    row = 2 * width + 4 * calls[0].walk.v_width
    return sum(call.keys_read for call in calls) + tokens * q_heads * row


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_decode_copies_what_it_needs(name, copied):
    p = _problem(name, 1, 1)
    with recorded() as calls:
        test_gpu_attention.run(p, max_query_len=1, interpret=interpret_gpu())
    assert sum(copied) == sum(call.bytes() for call in calls)
    assert sum(copied) <= 1.2 * _needed(p, calls)


@pytest.mark.slow
def test_a_window_copies_the_blocks_of_the_window_and_no_other(copied):
    heads, physical = SHAPES["SmolLM2"]
    p = problem(
        1, heads, [(512, [(300, 500)])], page_size=64, pages_per_seq=8, physical=physical
    )  # fmt: skip
    with recorded() as calls:
        test_gpu_attention.run(p, max_query_len=1, interpret=interpret_gpu())
    (call,) = calls
    blocks = -(-500 // call.walk.block) - 300 // call.walk.block
    other = call.bytes() - call.keys_read
    assert sum(copied) == blocks * call.walk.block * call.key_bytes + other


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SmolLM2", "Llama-3-8B, int8"])
@pytest.mark.parametrize("fill", [0, 264], ids=["whole walks", "splits"])
def test_prefill_copies_what_it_needs(name, fill, copied, monkeypatch):
    monkeypatch.setattr(test_gpu_attention.gpu, "_FILL", fill)
    heads = SHAPES[name][0]
    p = _problem(name, 1, 2 * (64 // (heads.q // heads.kv)))  # one tile of two warpgroups
    with recorded() as calls:
        test_gpu_attention.run(p, interpret=interpret_gpu())
    single, many = calls  # both kernels run: the first finds no sequence of one token
    assert sum(copied) == single.bytes(idle=single.tiles) + many.bytes(idle=many.tiles - 1)
    used = many.keys_read // many.tiles
    tokens, q_heads, width = p.q.shape
    assert sum(copied) <= 1.2 * (used + tokens * q_heads * (2 * width + 4 * width))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_mass_copies_what_is_said(name, copied):
    p = _problem(name, 1, 1)
    lse: Any = np.zeros(p.q.shape[:2], np.float32)
    with recorded() as calls:
        test_gpu_mass.run(p, lse, test_gpu_mass.segments_of(p), interpret=interpret_gpu())
    assert sum(copied) == sum(call.bytes() for call in calls)


@pytest.mark.parametrize("dtype", [np.uint16, np.int8])
def test_a_page_is_copied_in_and_out_once(dtype, copied):
    pool: Any = np.zeros((9, 2, 16, 64), dtype)
    pages = LayerPages(pool, pool)
    src: Any = np.array([0, 1, 2], np.int32)
    dst: Any = np.array([5, 6, -1], np.int32)
    jax.jit(lambda *x: copies.copy_pages(*x, interpret=interpret_gpu()))(pages, src, dst)
    assert sum(copied) == 2 * 2 * 2 * pages.k[0].nbytes


def test_a_shift_copies_its_keys_in_and_out_once_and_its_tables_per_group_of_heads(copied):
    pool: Any = np.zeros((4, 2, 64, 64), np.uint16)
    pages = LayerPages(pool, pool)
    slots: Any = np.arange(64, 192, dtype=np.int32)
    tables: Any = rotary_tables([1] * 128, np.ones(32))
    jax.jit(
        lambda pages, slots, *tables: shifts.reposition(
            pages, slots, None, *tables, interpret=interpret_gpu()
        )
    )(pages, slots, *tables)
    assert sum(copied) == 2 * 2 * pages.k[0].nbytes + 2 * tables[0].nbytes
