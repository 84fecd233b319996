"""The Mosaic GPU kernels, compiled for an H100 (sm_90) without one: `python -m tests.aot.cuda`.

Needs the CUDA plugin and PJRT of the installed jax (`jax-cuda13-plugin`, `jax-cuda13-pjrt`) and
`nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cupti nvidia-nvjitlink`; no driver.
It proves that a kernel compiles to a cubin, fits shared memory, works in place and copies no pool;
it proves neither numbers nor speed, and no case bounds bytes: this compiler counts none
(`cost_analysis` is empty). LLVM may abort the process on what it cannot select, so the
cases run in a child that is started again after an abort.
"""

import argparse
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.aot.cuda_candidates import candidates

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


def attention(
    target: Target, model: str, *, seqs: int, tokens: int, max_query_len: int | None,
    page_size: int = 64, pages_per_seq: int = 256, num_pages: int = 16384, dtype: str = "uint16",
    words: int = 0, sinks: bool = False, soft_cap: float | None = None, width: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`paged_attention` for `tokens` query tokens of `seqs` sequences."""
    import jax.numpy as jnp
    import numpy as np

    from kvjax.pallas_kernels import paged_attention

    latent = model in LATENT
    q_heads, kv_heads, head_dim, _ = (LATENT[model], 1, 576, None) if latent else MODELS[model]
    head_dim = width or head_dim
    pages, pool = layer_pages(target, (num_pages, kv_heads, page_size, head_dim), dtype, latent)

    def call(q, pages, tables, starts, kv_lens, lo, hi, tail_mask, sinks):
        return paged_attention(
            q, pages, tables, starts, kv_lens, lo, hi, scale=head_dim**-0.5, tail_mask=tail_mask,
            sinks=sinks, soft_cap=soft_cap, value_width=512 if latent else None,
            max_query_len=max_query_len, return_lse=True, backend="gpu",
        )  # fmt: skip

    ints = functools.partial(target.array, dtype=np.int32)
    compiled = target.compile(
        call,
        target.array((tokens, q_heads, head_dim), jnp.bfloat16),
        pages,
        ints((seqs, pages_per_seq)), ints((seqs + 1,)), ints((seqs,)), ints((tokens,)),
        ints((tokens,)),
        target.array((tokens, words), np.uint32) if words else None,
        target.array((q_heads,), np.float32) if sinks else None,
    )  # fmt: skip
    return check(compiled, pool, pools=1 if latent else 2, in_place=0)


def layer_pages(
    target: Target, shape: tuple[int, ...], dtype: str, latent: bool = False
) -> tuple[Any, Any]:
    """Pages in a physical dtype, with scales where it has some, and one of their pools."""
    from kvjax.pallas_kernels import LayerPages

    pool = target.array(shape, dtype)
    scale = target.array(shape[:3], "float32") if dtype in ("int8", "uint8") else None
    if latent:
        return LayerPages(pool, None, scale), pool
    return LayerPages(pool, pool, scale, scale), pool


def mass(
    target: Target, model: str, *, dtype: str = "uint16", tokens: int = 256, segments: int = 8,
    words: int = 0, pages_per_seq: int = 256,
) -> dict[str, Any]:  # fmt: skip
    """`attention_mass` of `tokens` query tokens of two sequences."""
    import jax.numpy as jnp
    import numpy as np

    from kvjax.pallas_kernels import attention_mass

    latent = model in LATENT
    q_heads, kv_heads, head_dim, _ = (LATENT[model], 1, 576, None) if latent else MODELS[model]
    shape = (_pages_of(model), kv_heads, 64, head_dim)
    pages, pool = layer_pages(target, shape, dtype, latent)
    ints = functools.partial(target.array, dtype=np.int32)

    def call(q, lse, pages, tables, starts, kv_lens, lo, hi, edges, tail_mask):
        return attention_mass(
            q, lse, pages, tables, starts, kv_lens, lo, hi, scale=head_dim**-0.5,
            segment_starts=edges, tail_mask=tail_mask, value_width=512 if latent else None,
            backend="gpu",
        )  # fmt: skip

    compiled = target.compile(
        call,
        target.array((tokens, q_heads, head_dim), jnp.bfloat16),
        target.array((tokens, q_heads), np.float32),
        pages,
        ints((2, pages_per_seq)), ints((3,)), ints((2,)), ints((tokens,)), ints((tokens,)),
        ints((2, segments + 1)) if segments else None,
        target.array((tokens, words), np.uint32) if words else None,
    )  # fmt: skip
    return check(compiled, pool, pools=1 if latent else 2, in_place=0)


def cascade(target: Target, model: str, *, seqs: int = 32, page_size: int = 64) -> dict[str, Any]:
    """`cascade_attention` for one token of each of `seqs` sequences, in any groups."""
    import jax.numpy as jnp
    import numpy as np

    from kvjax.pallas_kernels import LayerPages, cascade_attention

    q_heads, kv_heads, head_dim, _ = MODELS[model]
    pool = target.array((16384, kv_heads, page_size, head_dim), np.uint16)

    def call(q, pages, tables, starts, kv_lens, lo, hi, group_starts, prefix_lens):
        return cascade_attention(
            q, pages, tables, starts, kv_lens, lo, hi, group_starts=group_starts,
            prefix_lens=prefix_lens, scale=head_dim**-0.5, max_query_len=1, backend="gpu",
        )  # fmt: skip

    ints = functools.partial(target.array, dtype=np.int32)
    compiled = target.compile(
        call,
        target.array((seqs, q_heads, head_dim), jnp.bfloat16),
        LayerPages(pool, pool),
        ints((seqs, 256)), ints((seqs + 1,)), ints((seqs,)), ints((seqs,)), ints((seqs,)),
        ints((seqs + 1,)), ints((seqs,)),
    )  # fmt: skip
    return check(compiled, pool, pools=2, in_place=0)


def page_copy(
    target: Target, model: str, *, page_size: int = 64, dtype: str = "uint16"
) -> dict[str, Any]:
    """`copy_pages` of 16 pages."""
    import numpy as np

    from kvjax.pallas_kernels import copy_pages

    latent = model in LATENT
    _, kv_heads, head_dim, _ = (0, 1, 576, None) if latent else MODELS[model]
    pages, pool = layer_pages(target, (16384, kv_heads, page_size, head_dim), dtype, latent)
    ids, held = target.array((16,), np.int32), [x for x in pages if x is not None]
    compiled = target.compile(
        functools.partial(copy_pages, backend="gpu"), pages, ids, ids, donate_argnums=0
    )
    pools = 1 if latent else 2
    extra = sum(x.size * 4 for x in held[pools:])
    return check(compiled, pool, pools=pools, in_place=pools, scales=extra)


def quantise(target: Target, model: str, *, dtype: str) -> dict[str, Any]:
    """`write_slots` of 512 tokens into scaled pages: XLA's, which must work in place as well."""
    import jax.numpy as jnp
    import numpy as np

    from kvjax.pallas_kernels import write_slots

    _, kv_heads, head_dim, _ = MODELS[model]
    pages, pool = layer_pages(target, (16384, kv_heads, 64, head_dim), dtype)
    rows = target.array((512, kv_heads, head_dim), jnp.bfloat16)
    compiled = target.compile(
        functools.partial(write_slots, backend="xla"), pages, rows, rows,
        target.array((512,), np.int32), donate_argnums=0,
    )  # fmt: skip
    scales = 2 * 4 * pages.k_scale.size
    return check(compiled, pool, pools=2, in_place=2, scales=scales, kernel=None)


def rotary_shift(target: Target, model: str, *, page_size: int = 64) -> dict[str, Any]:
    """`rotary_shift` of 4096 slots."""
    import numpy as np

    from kvjax.pallas_kernels import LayerPages
    from kvjax.pallas_kernels.reposition import rotary_shift as shift

    _, kv_heads, head_dim, _ = MODELS[model]
    pool = target.array((16384, kv_heads, page_size, head_dim), np.uint16)
    table = target.array((4096, head_dim // 2), np.float32)
    compiled = target.compile(
        functools.partial(shift, backend="gpu"), LayerPages(pool, pool),
        target.array((4096,), np.int32), table, table, donate_argnums=0,
    )  # fmt: skip
    return check(compiled, pool, pools=2, in_place=2)


def check(
    compiled: Any, pool: Any, *, pools: int, in_place: int, scales: int = 0,
    kernel: str | None = "mosaic_gpu",
) -> dict[str, Any]:  # fmt: skip
    """What a compiled program must keep to; raises AssertionError with the numbers.

    `pools` arrays like `pool` are arguments, `in_place` of them are donated, and so are scales of
    `scales` bytes. `kernel` is what the program must call, if anything.
    """
    one = pool.size * pool.dtype.itemsize
    memory = compiled.memory_analysis()
    assert not (compiled.cost_analysis() or {}).get("bytes accessed"), "bytes could be bounded now"
    assert b"\x7fELF" in compiled.runtime_executable().serialize(), "no cubin in the executable"
    assert kernel is None or kernel in compiled.as_text(), f"no {kernel} kernel in the program"
    assert memory.alias_size_in_bytes == in_place * one + scales, (
        f"alias {memory.alias_size_in_bytes}"
    )
    temp = memory.temp_size_in_bytes
    assert temp < 0.01 * pools * one, f"temporary {temp} of a pool of {pools * one}"
    moved = pool_sized(compiled.as_text(), pool.size)
    # a scatter in place is as large as its pool: there, the two sizes above say that it is
    assert kernel is None or not moved, f"instructions of the pool's size: {moved}"
    return {"pool_bytes": pools * one, "alias_bytes": in_place * one, "temp_bytes": temp}


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


def cases() -> Iterator[tuple[str, Callable[[Target], dict[str, Any]]]]:
    """Name and check of each program, in the order in which they run."""
    for model in MODELS:
        decode = {"seqs": 64, "tokens": 64, "max_query_len": 1}
        if model == "Llama-3-8B":
            yield f"decode {model}", functools.partial(attention, model=model, **decode)
        else:
            yield (
                f"decode {model}",
                functools.partial(attention, model=model, **decode | {"seqs": 16, "tokens": 16}),
            )
        yield (
            f"prefill {model}",
            functools.partial(
                attention,
                model=model,
                seqs=8,
                tokens=1024,
                max_query_len=None,
                num_pages=32768 if model == "SmolLM2-135M" else 16384,
            ),
        )
        yield f"copy_pages {model}", functools.partial(page_copy, model=model)
        yield f"rotary_shift {model}", functools.partial(rotary_shift, model=model)
    llama = functools.partial(attention, model="Llama-3-8B", seqs=8, tokens=512)
    yield (
        "mask, cap, sinks",
        functools.partial(llama, max_query_len=None, words=2, sinks=True, soft_cap=30.0),
    )
    yield "cascade of 32", functools.partial(cascade, model="Llama-3-8B")
    yield "tree of 16", functools.partial(llama, tokens=128, max_query_len=16, words=1)
    yield "bfloat16 pool", functools.partial(llama, max_query_len=None, dtype="bfloat16")
    for page_size in (16, 32, 128):
        pages = 16384 * 64 // page_size
        yield (
            f"pages of {page_size}",
            functools.partial(llama, max_query_len=None, page_size=page_size, num_pages=pages),
        )
    for width in (80, 96, 192):
        yield f"head_dim {width}", functools.partial(llama, max_query_len=None, width=width)
    for name, dtype in (("int8", "int8"), ("float8", "uint8")):
        for model in MODELS:
            of = functools.partial(attention, model=model, dtype=dtype, num_pages=32768)
            yield (
                f"decode {name} {model}",
                functools.partial(of, seqs=16, tokens=16, max_query_len=1),
            )
            yield (
                f"prefill {name} {model}",
                functools.partial(of, seqs=8, tokens=1024, max_query_len=None),
            )
    for model in (*MODELS, "DeepSeek-V3"):
        yield f"mass {model}", functools.partial(mass, model=model)
    for model, dtype in (("Llama-3-8B", "int8"), ("DeepSeek-V3", "uint8")):
        yield f"mass {dtype} {model}", functools.partial(mass, model=model, dtype=dtype, words=2)
    yield "mass without segments", functools.partial(mass, model="Llama-3-8B", segments=0)
    long = {"tokens": 4096, "segments": 64, "pages_per_seq": 1024}
    yield "mass in turns", functools.partial(mass, model="Llama-3-8B", **long)
    for model in LATENT:
        for name, dtype in (("", "uint16"), (" int8", "int8"), (" float8", "uint8")):
            of = functools.partial(attention, model=model, dtype=dtype, num_pages=262144)
            yield (
                f"decode{name} {model}",
                functools.partial(of, seqs=16, tokens=16, max_query_len=1),
            )
            yield (
                f"prefill{name} {model}",
                functools.partial(of, seqs=8, tokens=256, max_query_len=None),
            )
    yield "copy_pages DeepSeek-V3", functools.partial(page_copy, model="DeepSeek-V3")
    for name, dtype in (("int8", "int8"), ("float8", "uint8")):
        of_llama = {"model": "Llama-3-8B", "dtype": dtype}
        yield f"copy_pages {name}", functools.partial(page_copy, **of_llama)
        yield f"write_slots {name} by xla", functools.partial(quantise, **of_llama)
    yield "shift, pages of 16", functools.partial(rotary_shift, model="SmolLM2-135M", page_size=16)
    yield from candidates(_TUNED, (*MODELS, *LATENT))


def _decode(target: Target, model: str) -> dict[str, Any]:
    return attention(target, model, seqs=16, tokens=16, max_query_len=1, num_pages=_pages_of(model))


def _prefill(target: Target, model: str) -> dict[str, Any]:
    return attention(
        target, model, seqs=4, tokens=512, max_query_len=None, num_pages=_pages_of(model)
    )


_TUNED = {
    "paged_attention/gpu_decode": _decode,
    "paged_attention/gpu_prefill": _prefill,
    "attention_mass/gpu_keys": mass,
}


def _pages_of(model: str) -> int:
    """So many that the rows of a call are little beside its pool."""
    return 262144 if model in LATENT else 65536


def missing() -> str | None:
    """Why nothing can be compiled here, if so."""
    import jax

    if jax.__version_info__ < (0, 11):
        return f"jax {jax.__version__} has no deviceless CUDA target (0.11.2 and 0.12 have)"
    if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        return "the CUDA plugin (jax-cuda13-plugin) is not installed"
    return None


def _child(first: int, last: float, only: str) -> None:
    """Runs the cases from `first` on; one JSON line each."""
    target = None
    for number, (name, run) in enumerate(chosen(only)):
        if number < first:
            continue
        start = time.perf_counter()
        row: dict[str, Any] = {"case": name}
        if time.time() > last:
            print(json.dumps(row | {"skipped": "no time left"}), flush=True)
            continue
        print(json.dumps(row | {"started": True}), flush=True)
        try:
            target = target or Target()
            row |= run(target)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        print(json.dumps(row | {"seconds": round(time.perf_counter() - start, 2)}), flush=True)


def chosen(only: str) -> list[tuple[str, Callable[[Target], dict[str, Any]]]]:
    """The cases whose name has `only` in it."""
    return [case for case in cases() if only in case[0]]


def run(minutes: float, only: str) -> list[dict[str, Any]]:
    """Prints and returns all cases; their process is started again when a case kills it."""
    last, rows, total = time.time() + 60 * minutes, [], len(chosen(only))
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    while len(rows) < total:
        command = [sys.executable, "-m", "tests.aot.cuda", "--only", only]
        command += ["--child", str(len(rows)), str(last)]
        with tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env
            )
            assert child.stdout is not None
            lines = [json.loads(text) for text in _told(child.stdout) if text.startswith("{")]
            child.wait()
            errors.seek(0)
            tail = errors.read().strip().splitlines()[-1:] or ["no message"]
        done = [row for row in lines if "started" not in row]
        rows += done
        if len(rows) < total and (child.returncode or not done):
            name = lines[-1]["case"] if lines else "start"
            rows.append({"case": name, "error": f"exit {child.returncode}: {tail[0][:300]}"})
            print(line(rows[-1]), flush=True)
            if not lines:
                return rows
    return rows


def _told(child: Any) -> Iterator[str]:
    """The child's lines, its results printed as they come."""
    for text in child:
        if text.startswith("{") and "started" not in (row := json.loads(text)):
            print(line(row), flush=True)
        yield text


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    if "error" in row:
        return f"FAILED   {row['case']:28} {row['error']}"
    if "skipped" in row:
        return f"skipped  {row['case']:28} {row['skipped']}"
    if "refused" in row:
        return f"refused  {row['case']:28} {row['refused']}"
    share = 100 * row["temp_bytes"] / row["pool_bytes"]
    return (
        f"ok       {row['case']:28} {row['seconds']:6.1f} s  pool {row['pool_bytes'] >> 20} MiB, "
        f"in place {row['alias_bytes'] >> 20} MiB, temporary {share:.3f} %"
    )


def main() -> int:
    """Prints a line per case; 1 if one failed. What cannot run is skipped with the reason."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _child(int(args.child[0]), float(args.child[1]), args.only)
        return 0
    if why := missing():
        print(f"skipped  all CUDA cases: {why}")
        return 0
    return int(any("error" in row for row in run(args.minutes, args.only)))


if __name__ == "__main__":
    sys.exit(main())
