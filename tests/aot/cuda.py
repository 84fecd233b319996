"""The Mosaic GPU kernels, compiled for an H100 (sm_90) without one: `python -m tests.aot.cuda`.

Needs the CUDA plugin and PJRT of the installed jax (`jax-cuda13-plugin`, `jax-cuda13-pjrt`) and
`nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cupti nvidia-nvjitlink`; no driver.
It proves that a kernel compiles to a cubin, fits shared memory, works in place, copies no pool, and
that its program moves at most 1.2 times the bytes of its formula. This compiler counts none: those
of the kernels are what `tests.gpu_bytes` says, and those of XLA around them are counted from the
compiled text. It proves neither numbers nor speed. LLVM may abort the process on what it cannot
select, so the cases run in a child that is started again after an abort.
"""

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.aot.cuda_candidates import candidates
from tests.aot.cuda_target import LATENT, MODELS, Target, check, layer_pages
from tests.gpu_bytes import Call, recorded


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
    pages = layer_pages(target, (num_pages, kv_heads, page_size, head_dim), dtype, latent)

    def call(q, pages, tables, starts, kv_lens, lo, hi, tail_mask, sinks):
        return paged_attention(
            q, pages, tables, starts, kv_lens, lo, hi, scale=head_dim**-0.5, tail_mask=tail_mask,
            sinks=sinks, soft_cap=soft_cap, value_width=512 if latent else None,
            max_query_len=max_query_len, return_lse=True, backend="gpu",
        )  # fmt: skip

    ints = functools.partial(target.array, dtype=np.int32)
    with recorded() as calls:
        compiled = target.compile(
            call,
            target.array((tokens, q_heads, head_dim), jnp.bfloat16),
            pages,
            ints((seqs, pages_per_seq)), ints((seqs + 1,)), ints((seqs,)), ints((tokens,)),
            ints((tokens,)),
            target.array((tokens, words), np.uint32) if words else None,
            target.array((q_heads,), np.float32) if sinks else None,
        )  # fmt: skip
    row = q_heads * (2 * head_dim + 4 * (512 if latent else head_dim))
    return check(compiled, pages, in_place=0, **costs(calls, tokens * row))


def costs(calls: list[Call], rows: int) -> dict[str, Any]:
    """Bytes of a task whose tiles read all keys of their sequences, and those that kernels copy."""
    return {
        "formula": sum(call.keys_read for call in calls) + rows,
        "copied": sum(call.bytes() for call in calls),
    }


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
    pages = layer_pages(target, shape, dtype, latent)
    ints = functools.partial(target.array, dtype=np.int32)

    def call(q, lse, pages, tables, starts, kv_lens, lo, hi, edges, tail_mask):
        return attention_mass(
            q, lse, pages, tables, starts, kv_lens, lo, hi, scale=head_dim**-0.5,
            segment_starts=edges, tail_mask=tail_mask, value_width=512 if latent else None,
            backend="gpu",
        )  # fmt: skip

    with recorded() as calls:
        compiled = target.compile(
            call,
            target.array((tokens, q_heads, head_dim), jnp.bfloat16),
            target.array((tokens, q_heads), np.float32),
            pages,
            ints((2, pages_per_seq)), ints((3,)), ints((2,)), ints((tokens,)), ints((tokens,)),
            ints((2, segments + 1)) if segments else None,
            target.array((tokens, words), np.uint32) if words else None,
        )  # fmt: skip
    rows = tokens * (q_heads * (2 * head_dim + 4) + 4 * segments) + 4 * 2 * 64 * pages_per_seq
    return check(compiled, pages, in_place=0, **costs(calls, rows))


def cascade(target: Target, model: str, *, seqs: int = 32, page_size: int = 64) -> dict[str, Any]:
    """`cascade_attention` for one token of each of `seqs` sequences, in any groups."""
    import jax.numpy as jnp
    import numpy as np

    from kvjax.pallas_kernels import cascade_attention

    q_heads, kv_heads, head_dim, _ = MODELS[model]
    pages = layer_pages(target, (16384, kv_heads, page_size, head_dim), "uint16")

    def call(q, pages, tables, starts, kv_lens, lo, hi, group_starts, prefix_lens):
        return cascade_attention(
            q, pages, tables, starts, kv_lens, lo, hi, group_starts=group_starts,
            prefix_lens=prefix_lens, scale=head_dim**-0.5, max_query_len=1, backend="gpu",
        )  # fmt: skip

    ints = functools.partial(target.array, dtype=np.int32)
    with recorded() as calls:
        compiled = target.compile(
            call,
            target.array((seqs, q_heads, head_dim), jnp.bfloat16),
            pages,
            ints((seqs, 256)), ints((seqs + 1,)), ints((seqs,)), ints((seqs,)), ints((seqs,)),
            ints((seqs + 1,)), ints((seqs,)),
        )  # fmt: skip
    return check(compiled, pages, in_place=0, **costs(calls, seqs * q_heads * head_dim * 6))


def page_copy(
    target: Target, model: str, *, page_size: int = 64, dtype: str = "uint16"
) -> dict[str, Any]:
    """`copy_pages` of 16 pages."""
    import numpy as np

    from kvjax.pallas_kernels import copy_pages

    latent = model in LATENT
    _, kv_heads, head_dim, _ = (0, 1, 576, None) if latent else MODELS[model]
    pages = layer_pages(target, (16384, kv_heads, page_size, head_dim), dtype, latent)
    ids, held = target.array((16,), np.int32), nbytes(pages)
    compiled = target.compile(
        functools.partial(copy_pages, backend="gpu"), pages, ids, ids, donate_argnums=0
    )
    pools = nbytes((pages.k, pages.v))
    moved: dict[str, Any] = {"formula": 2 * 16 * held // 16384, "copied": 2 * 16 * pools // 16384}
    return check(compiled, pages, in_place=held, **moved)


def nbytes(arrays: Any) -> int:
    """Bytes of those that are there."""
    return sum(x.size * x.dtype.itemsize for x in arrays if x is not None)


def write(target: Target, model: str, *, dtype: str = "uint16", tokens: int = 512) -> dict:
    """`write_slots` by XLA; scaled rows are read twice, for their scales and to be rounded."""
    import jax.numpy as jnp
    import numpy as np

    from kvjax.pallas_kernels import write_slots

    _, kv_heads, head_dim, _ = MODELS[model]
    pages = layer_pages(target, (16384, kv_heads, 64, head_dim), dtype)
    rows = target.array((tokens, kv_heads, head_dim), jnp.bfloat16)
    compiled = target.compile(
        functools.partial(write_slots, backend="xla"), pages, rows, rows,
        target.array((tokens,), np.int32), donate_argnums=0,
    )  # fmt: skip
    held = nbytes(pages)
    reads = 2 if pages.quantised else 1
    formula = 2 * reads * nbytes([rows]) + tokens * held // (16384 * 64)
    return check(compiled, pages, in_place=held, formula=formula, kernel=None)


def gather(target: Target, model: str, *, dtype: str = "uint16", tokens: int = 512) -> dict:
    """`export_span` by XLA: rows are read and written."""
    import numpy as np

    from kvjax.pallas_kernels import export_span

    _, kv_heads, head_dim, _ = MODELS[model]
    pages = layer_pages(target, (16384, kv_heads, 64, head_dim), dtype)
    compiled = target.compile(
        functools.partial(export_span, backend="xla"), pages, target.array((tokens,), np.int32)
    )
    formula = 2 * tokens * nbytes(pages) // (16384 * 64)
    return check(compiled, pages, in_place=0, formula=formula, kernel=None)


def move(target: Target, model: str, *, tokens: int = 512) -> dict:
    """`reposition` by XLA: rows are read and kept (runs may overlap), then read and written."""
    import numpy as np

    from kvjax.pallas_kernels import reposition

    _, kv_heads, head_dim, _ = MODELS[model]
    pages = layer_pages(target, (16384, kv_heads, 64, head_dim), "uint16")
    table = target.array((tokens, head_dim // 2), np.float32)
    slots = target.array((tokens,), np.int32)
    compiled = target.compile(
        functools.partial(reposition, backend="xla"), pages, slots, slots, table, table,
        donate_argnums=0,
    )  # fmt: skip
    held = nbytes(pages)
    formula = 4 * tokens * held // (16384 * 64) + nbytes((table, table))
    return check(compiled, pages, in_place=held, formula=formula, kernel=None)


def rotary_shift(target: Target, model: str, *, page_size: int = 64) -> dict[str, Any]:
    """`rotary_shift` of 4096 slots: keys are read and written, and tables are read."""
    import numpy as np

    from kvjax.pallas_kernels.reposition import gpu
    from kvjax.pallas_kernels.reposition import rotary_shift as shift

    _, kv_heads, head_dim, _ = MODELS[model]
    pages = layer_pages(target, (16384, kv_heads, page_size, head_dim), "uint16")
    table = target.array((4096, head_dim // 2), np.float32)
    compiled = target.compile(
        functools.partial(shift, backend="gpu"), pages, target.array((4096,), np.int32), table,
        table, donate_argnums=0,
    )  # fmt: skip
    keys, tables = 2 * 4096 * kv_heads * head_dim * 2, nbytes((table, table))
    groups = kv_heads // gpu.heads_at_once(kv_heads, head_dim, head_dim // 2)
    return check(
        compiled, pages, in_place=nbytes(pages), formula=keys + tables,
        copied=keys + groups * tables,
    )  # fmt: skip


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
        yield f"write_slots {name} by xla", functools.partial(write, **of_llama)
        yield f"export_span {name} by xla", functools.partial(gather, **of_llama)
    for model in MODELS:
        yield f"write_slots {model} by xla", functools.partial(write, model=model)
        yield f"export_span {model} by xla", functools.partial(gather, model=model)
        yield f"reposition {model} by xla", functools.partial(move, model=model)
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
    told = "bytes not bounded: a loop"
    if row["ratio"] is not None:
        told = f"bytes / formula {row['ratio']:.2f}"
    share = 100 * row["temp_bytes"] / row["pool_bytes"]
    return (
        f"ok       {row['case']:28} {row['seconds']:6.1f} s  pool {row['pool_bytes'] >> 20} MiB, "
        f"in place {row['alias_bytes'] >> 20} MiB, temporary {share:.3f} %, {told}"
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
