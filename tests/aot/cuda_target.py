"""An H100 that is not there, what its programs are made of, and what they must keep to."""

import re
from collections.abc import Callable
from typing import Any

from tests.aot.hbm_bytes import FREE, instructions

MODELS = {  # query heads, KV heads, head_dim, sliding window
    "SmolLM2-135M": (9, 3, 64, None),
    "Llama-3-8B": (32, 8, 128, None),
    "Qwen3-0.6B": (16, 8, 128, None),
    "Gemma-3-4B": (8, 4, 256, 1024),
}
LATENT = {  # query heads over one latent head of 512 + 64 channels, of which 512 are the values
    "DeepSeek-V2-Lite": 16,
    "DeepSeek-V3": 128,
}
_H100 = """gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 } threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_INDICES = 1 << 20  # bytes of a loop that looks something up
_MAY_BE_POOL_SIZED = (  # what an instruction of the pool's size may be: it moves nothing
    "parameter", "custom-call", "bitcast", "bitcast-convert", "tuple", "get-tuple-element",
)  # fmt: skip


class Target:
    """An H100 that is not there."""

    def __init__(self) -> None:
        import jax
        import numpy as np
        from jax.experimental import topologies
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        topology = topologies.get_topology_desc(
            "", platform="cuda", topology="1x1x1", target_config=_H100
        )
        self.mesh = Mesh(np.array(topology.devices[:1]), ("x",))
        self._sharding = NamedSharding(self.mesh, PartitionSpec())
        self._struct = jax.ShapeDtypeStruct

    def array(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An argument on that device."""
        return self._struct(shape, dtype, sharding=self._sharding)

    def compile(self, fn: Callable, *args: Any, **options: Any) -> Any:
        """`jax.jit(fn, **options)` compiled for that device."""
        import jax

        from kvjax.pallas_kernels import hopper

        with hopper.ahead_of_time(), jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return jax.jit(fn, **options).lower(*args).compile()


def layer_pages(target: Target, shape: tuple[int, ...], dtype: str, latent: bool = False) -> Any:
    """Pages in a physical dtype, with scales where it has some."""
    from kvjax.pallas_kernels import LayerPages

    pool = target.array(shape, dtype)
    scale = target.array(shape[:3], "float32") if dtype in ("int8", "uint8") else None
    if latent:
        return LayerPages(pool, None, scale)
    return LayerPages(pool, pool, scale, scale)


def check(
    compiled: Any, pages: Any, *, in_place: int, formula: int, copied: int = 0,
    kernel: str | None = "mosaic_gpu",
) -> dict[str, Any]:  # fmt: skip
    """What a compiled program must keep to; raises AssertionError with the numbers.

    The first `in_place` bytes of `pages` are donated. `formula` are the bytes that the task has to
    move, `copied` those that its kernels do (`tests.gpu_bytes`); XLA's around them are counted from
    the text. `kernel` is what the program must call, if anything.
    """
    held = [x.size * x.dtype.itemsize for x in pages if x is not None]
    pool, text, memory = sum(held), compiled.as_text(), compiled.memory_analysis()
    assert not (compiled.cost_analysis() or {}).get("bytes accessed"), "the compiler counts now"
    assert b"\x7fELF" in compiled.runtime_executable().serialize(), "no cubin in the executable"
    assert kernel is None or kernel in text, f"no {kernel} kernel in the program"
    assert memory.alias_size_in_bytes == in_place, f"alias {memory.alias_size_in_bytes}"
    temp = memory.temp_size_in_bytes
    assert temp < 0.01 * pool, f"temporary {temp} of a pool of {pool}"
    sized = pool_sized(text, pages.k.size)
    # a scatter in place is as large as its pool: there, the two sizes above say that it is
    assert kernel is None or not sized, f"instructions of the pool's size: {sized}"
    row = {"pool_bytes": pool, "alias_bytes": in_place, "temp_bytes": temp}
    around = xla_bytes(text, set(held))
    if around is None:
        return row | {"ratio": None}
    moved = copied + around
    assert moved <= 1.2 * formula, f"bytes {moved}, formula {formula}, {moved / formula:.2f}"
    return row | {"ratio": round(moved / formula, 3)}


def xla_bytes(text: str, held: set[int]) -> int | None:
    """Bytes that XLA's own instructions read and write; None where a loop moves more than indices.

    An array of one of the sizes `held` is a pool, which a gather reads at as many places as its
    result has, and a scatter in place writes at as many as there are updates.
    """
    made, total = {}, 0
    for one in instructions(text):
        made[one.name] = one
        if one.op in FREE or "mosaic_gpu" in one.text:
            continue
        read = [made[name] for name in one.operands]
        sizes = [size for x in (*read, one) for size, _ in x.arrays]
        if one.op == "while":
            turns = re.search(r'known_trip_count[^}]*?"n":"(\d+)"', one.text)
            if turns is None or sum(sizes) > _INDICES:
                return None
            total += int(turns[1]) * sum(sizes)
            continue
        total += sum(size for size in sizes if size not in held)
        pools = [x for x in read if x.arrays and x.arrays[0][0] in held]
        if one.arrays and one.arrays[0][0] in held:
            updates = max(x.elements[0][0] for x in read if x not in pools)
            total += updates * one.elements[0][1]
        elif pools:
            total += sum(size for size, _ in one.arrays)
    return total


def pool_sized(text: str, elements: int) -> list[str]:
    """Opcodes of the instructions in HLO `text` that make an array as large as the pool."""
    found = []
    for dims, op in re.findall(r" = \w+\[([\d,]+)\](?:\{[^}]*\})? ([\w-]+)\(", text):
        size = 1
        for dim in dims.split(","):
            size *= int(dim)
        if size >= elements and op not in _MAY_BE_POOL_SIZED:
            found.append(op)
    return found
