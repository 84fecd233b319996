"""The Mosaic TPU kernels, compiled for v5e, v6e and tpu7x without one: `python -m tests.aot.tpu`.

libtpu brings the compiler and needs no device. A compile proves that Mosaic takes the kernel and
that it fits VMEM; on top of it every program must work in place (alias bytes are the pool's), keep
its temporaries below 1 % of the pool, make no other array of the pool's size and move no more than
1.2 times the bytes of its formula. For attention and page copies those are the compiler's "bytes
accessed". For rows on their way between tokens and tiles (write, gather, shift, move) these would
say nothing: XLA turns the rows around the kernel, and its cost analysis counts each array it makes,
though all of them lie in VMEM. There `hbm_bytes` counts what the text moves to and from HBM.
Where a compiler moves rows out of VMEM for a while (libtpu 0.0.50 does, for some moves on tpu7x),
these bytes are told apart, and the program may have twice its formula in all. Two writes on v5e
move more (`write` says which and why).
Where nobody can know the bytes, a case says so. Neither numbers nor speed are proved here.
"""

import argparse
import functools
import importlib.metadata
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ |= {  # before jax: what libtpu would otherwise ask a machine with a TPU for
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.cache.pages import KVPages
from kvjax.pallas_kernels import (
    PackedPages,
    attention_mass,
    cascade_attention,
    copy_pages,
    export_span,
    paged_attention,
    reposition,
    rotary_shift,
    write_slots,
)
from kvjax.pallas_kernels.page_ops.packing import packed_scale_shape, packed_width
from kvjax.pallas_kernels.paged_attention.tpu import prefill_tile
from tests.aot import tpu_step
from tests.aot.hbm_bytes import argument_bytes, hbm_bytes, kept_bytes

_KV_DTYPES = {"uint16": "bfloat16", "int8": "int8"}  # what the engine calls them
CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
LIBTPU = {(0, 10): "0.0.42", (0, 11): "0.0.48", (0, 12): "0.0.50"}  # that of jax's own tpu extra
_PAGE, _POOL_BYTES = 64, 512 << 20
_MOVES_NOTHING = {"parameter", "bitcast", "tuple", "get-tuple-element", "custom-call", "fusion"}


class Model(NamedTuple):
    """What attention of a model looks like."""

    q_heads: int
    kv_heads: int
    width: int
    latent: int | None = None
    soft_cap: float | None = None


MODELS = {
    "SmolLM2-135M": Model(9, 3, 64),
    "Llama-3-8B": Model(32, 8, 128),
    "Qwen3-0.6B": Model(16, 8, 128),
    "Gemma-3-4B": Model(8, 4, 256),
    "Gemma-3-1B": Model(4, 1, 256),
    "DeepSeek-MLA": Model(128, 1, 576, latent=512),
}


class Chip:
    """A TPU that is not there."""

    def __init__(self, name: str, topology: str) -> None:
        self.name = name
        devices = topologies.get_topology_desc(topology, platform="tpu").devices
        self.mesh = Mesh(np.array(devices[:1]), ("x",))

    def array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """An argument on that device."""
        sharding = NamedSharding(self.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def compile(self, fn: Callable, *args: Any, donate: bool) -> Any:
        """The jitted function, compiled for that device; its first argument donated if asked."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return jax.jit(fn, donate_argnums=(0,) if donate else ()).lower(*args).compile()


class Program(NamedTuple):
    """A function of pages first, its arguments, and the bytes that it has to move."""

    fn: Callable
    args: tuple[Any, ...]
    formula: int  # of rows: the bytes of the pool; their arguments and results are added
    donate: bool = True
    rows: bool = False  # moves rows between the pool and arrays of tokens
    most: tuple[float, float] = (1.2, 2.0)  # of the formula: without such temporaries, and in all
    unknown: str = ""  # why the bytes that the compiler counts say nothing


def pool_of(chip: Chip, model: Model, dtype: Any) -> tuple[PackedPages, int]:
    """Packed pages of about `_POOL_BYTES`, and the bytes of one slot of all heads."""
    width = packed_width(model.width, None if model.latent else model.width)
    slot = model.kv_heads * width * jnp.dtype(dtype).itemsize
    num_pages = _POOL_BYTES // (_PAGE * slot)
    scale = None
    if jnp.dtype(dtype).itemsize == 1:
        shape = packed_scale_shape(model.kv_heads, _PAGE, latent=model.latent is not None)
        scale = chip.array((num_pages, *shape), jnp.float32)
        slot += 4 * shape[0] * shape[1] // _PAGE
    pages: Any = (chip.array((num_pages, model.kv_heads, _PAGE, width), dtype), scale)
    return PackedPages(*pages), slot


def attention(
    chip: Chip, model: Model, dtype: Any, *, seqs: int, tokens: int, context: int, words: int = 0
) -> Program:
    """Decode if there are as many tokens as sequences, else a prefill of many tiles."""
    pages, slot = pool_of(chip, model, dtype)
    ints = functools.partial(chip.array, dtype=jnp.int32)

    def run(pages, q, tables, starts, kv_lens, lo, hi, tail_mask):
        return paged_attention(
            q, pages, tables, starts, kv_lens, lo, hi, scale=0.1, soft_cap=model.soft_cap,
            tail_mask=tail_mask, value_width=model.latent,
            max_query_len=1 if tokens == seqs else None, backend="tpu",
        )  # fmt: skip

    args = (
        pages, chip.array((tokens, model.q_heads, model.width), jnp.bfloat16),
        ints((seqs, context // _PAGE)), ints((seqs + 1,)), ints((seqs,)), ints((tokens,)),
        ints((tokens,)), chip.array((tokens, words), jnp.uint32) if words else None,
    )  # fmt: skip
    # every tile reads its whole context once; so do the sequences that bring one token
    walks = seqs
    if tokens > seqs:
        walks += -(-tokens // prefill_tile(pages, model.q_heads, model.latent, tokens))
    row = model.q_heads * (2 * model.width + 4 * (model.latent or model.width))
    return Program(run, args, walks * context * slot + tokens * row, donate=False)


def mass(chip: Chip, model: Model, dtype: Any, *, tokens: int = 256) -> Program:
    """Column and segment sums of two sequences."""
    pages, slot = pool_of(chip, model, dtype)
    seqs, context, segments = 2, 131072, 4
    ints = functools.partial(chip.array, dtype=jnp.int32)

    def run(pages, q, lse, tables, starts, kv_lens, lo, hi, segment_starts):
        return attention_mass(
            q, lse, pages, tables, starts, kv_lens, lo, hi, scale=0.1, soft_cap=model.soft_cap,
            value_width=model.latent, segment_starts=segment_starts, backend="tpu",
        )  # fmt: skip

    args = (
        pages, chip.array((tokens, model.q_heads, model.width), jnp.bfloat16),
        chip.array((tokens, model.q_heads), jnp.float32), ints((seqs, context // _PAGE)),
        ints((seqs + 1,)), ints((seqs,)), ints((tokens,)), ints((tokens,)),
        ints((seqs, segments + 1)),
    )  # fmt: skip
    walks = -(-tokens // prefill_tile(pages, model.q_heads, model.latent, tokens))
    row = model.q_heads * 2 * (model.width + 2)
    formula = walks * context * slot + tokens * row
    return Program(run, args, formula, donate=False)


def cascade(chip: Chip, model: Model, dtype: Any) -> Program:
    """Decode of 32 sequences in any groups."""
    pages, slot = pool_of(chip, model, dtype)
    seqs, context = 32, 16384
    ints = functools.partial(chip.array, dtype=jnp.int32)

    def run(pages, q, tables, starts, kv_lens, lo, hi, group_starts, prefix_lens):
        return cascade_attention(
            q, pages, tables, starts, kv_lens, lo, hi, group_starts=group_starts,
            prefix_lens=prefix_lens, scale=0.1, soft_cap=model.soft_cap, value_width=model.latent,
            max_query_len=1, backend="tpu",
        )  # fmt: skip

    args = (
        pages, chip.array((seqs, model.q_heads, model.width), jnp.bfloat16),
        ints((seqs, context // _PAGE)), ints((seqs + 1,)), ints((seqs,)), ints((seqs,)),
        ints((seqs,)), ints((seqs + 1,)), ints((seqs,)),
    )  # fmt: skip
    return Program(run, args, 2 * seqs * context * slot, donate=False, unknown="groups are data")


def whole_step(chip: Chip, model: Model, dtype: Any, *, cascade: bool = False) -> Program:
    """A decode step of the engine, two layers deep, on its own weights and packed pages."""
    del model
    fn, args = tpu_step.engine_step(chip.array, _KV_DTYPES[jnp.dtype(dtype).name], cascade)
    return Program(fn, args, 0, unknown="lengths are data")


def write(chip: Chip, model: Model, dtype: Any, *, tokens: int = 1024) -> Program:
    """Tiles of the pool are read, rows merged with them, and written."""
    pages, slot = pool_of(chip, model, dtype)
    new = chip.array((tokens, model.kv_heads, model.width), jnp.bfloat16)
    v = None if model.latent else new
    slots = chip.array((tokens,), jnp.int32)
    run = functools.partial(write_slots, backend="tpu")
    # Some rows of 2,048 bytes leave VMEM on v5e to be turned; no other chip does that.
    turned = chip.name == "v5e" and model.kv_heads * model.width >= 1024
    most = (1.6, 2.2) if turned else (1.2, 2.0)
    return Program(run, (pages, new, v, slots), tokens * 2 * slot, rows=True, most=most)


def gather(chip: Chip, model: Model, dtype: Any, *, tokens: int = 1024) -> Program:
    """Rows are read from the pool."""
    pages, slot = pool_of(chip, model, dtype)
    widths = (model.width, None if model.latent else model.width)
    run = functools.partial(export_span, widths=widths, backend="tpu")
    args = (pages, chip.array((tokens,), jnp.int32))
    return Program(run, args, tokens * slot, donate=False, rows=True)


def copy(chip: Chip, model: Model, dtype: Any, *, pages_copied: int = 16) -> Program:
    """Pages are read and written."""
    pages, slot = pool_of(chip, model, dtype)
    ids = chip.array((pages_copied,), jnp.int32)
    run = functools.partial(copy_pages, backend="tpu")
    return Program(run, (pages, ids, ids), 2 * pages_copied * _PAGE * slot)


def shift(chip: Chip, model: Model, dtype: Any, *, tokens: int = 1024) -> Program:
    """Rows are read and written; scaled ones are read before, for their keys get new scales."""
    pages, slot = pool_of(chip, model, dtype)
    offset = model.latent or 0
    half = (model.width - offset) // 2
    tables = chip.array((tokens, half), jnp.float32)
    run = functools.partial(rotary_shift, rotary_offset=offset, backend="tpu")
    args = (pages, chip.array((tokens,), jnp.int32), tables, tables)
    return Program(run, args, tokens * (2 if pages.scale is None else 3) * slot, rows=True)


def move(chip: Chip, model: Model, dtype: Any, *, tokens: int = 1024) -> Program:
    """A gather and a write."""
    pages, slot = pool_of(chip, model, dtype)
    offset = model.latent or 0
    tables = chip.array((tokens, (model.width - offset) // 2), jnp.float32)
    slots = chip.array((tokens,), jnp.int32)
    run = functools.partial(reposition, rotary_offset=offset, backend="tpu")
    return Program(run, (pages, slots, slots, tables, tables), tokens * 3 * slot, rows=True)


def cases() -> Iterator[tuple[str, str, Callable[[Chip], Program]]]:
    """Chip, name and program, the most telling first."""
    decode = functools.partial(attention, seqs=32, tokens=32, context=32768)
    prefill = functools.partial(attention, seqs=2, tokens=1024, context=131072)
    rest = {"write": write, "gather": gather, "copy": copy, "shift": shift, "move": move}
    first = {"decode": decode, "prefill": prefill} | rest
    for kinds, names, programs in (
        (
            ("uint16", "int8"), ("SmolLM2-135M",),
            {"step": whole_step, "cascade step": functools.partial(whole_step, cascade=True)},
        ),
        (("bfloat16",), tuple(MODELS), first),
        (("uint16", "int8", "uint8"), ("Llama-3-8B", "DeepSeek-MLA"), first),
        (("float32",), ("SmolLM2-135M", "Llama-3-8B"), first),
        (
            ("bfloat16",), ("Llama-3-8B", "Gemma-3-4B"),
            {
                "decode of a tree": functools.partial(decode, words=4),
                "prefill with a mask": functools.partial(prefill, words=4),
            },
        ),
        (("bfloat16", "int8"), ("Llama-3-8B", "DeepSeek-MLA"), {"cascade": cascade}),
        (("bfloat16",), tuple(MODELS), {"mass": mass}),
        (("int8",), ("Llama-3-8B", "DeepSeek-MLA"), {"mass": mass}),
    ):  # fmt: skip
        for kind in kinds:
            for name in names:
                for what, program in programs.items():
                    for chip in CHIPS:
                        run = functools.partial(program, model=MODELS[name], dtype=jnp.dtype(kind))
                        yield chip, f"{what}, {name}, {kind}", run


def one_layer(pages: PackedPages | KVPages) -> PackedPages:
    """Pages of one layer, whose pools are as large as those of every other."""
    layer = pages.layers[0] if isinstance(pages, KVPages) else pages
    assert isinstance(layer, PackedPages)
    return layer


def pool_sized(text: str, pages: PackedPages) -> list[str]:
    """Instructions of HLO `text` that copy an array as large as the pool, or the one of scales."""
    found, scales = [], 0 if pages.scale is None else pages.scale.size
    for dims, op in re.findall(r" = \(?\w+\[([\d,]+)\](?:\{[^}]*\})?.*? ([\w-]+)\(", text):
        shape = [int(n) for n in dims.split(",")]
        size = int(np.prod(shape))
        large = size >= pages.kv.size or (size == scales and shape[0] == pages.num_pages)
        if large and op not in _MOVES_NOTHING:
            found.append(f"{op} [{dims}]")
    return found


def check(compiled: Any, program: Program) -> str:
    """What a compiled program must keep to, in words; raises AssertionError with the numbers."""
    pages: PackedPages | KVPages = program.args[0]
    pool = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pages))
    memory = compiled.memory_analysis()
    alias, temp = memory.alias_size_in_bytes, memory.temp_size_in_bytes
    assert alias == (pool if program.donate else 0), f"alias {alias} of a pool of {pool}"
    # queries and results are no part of the pool, whatever order or width their copies have
    rows = sum(4 * x.size for x in jax.tree.leaves(program.args[1:]))
    rows += 2 * (memory.output_size_in_bytes - alias)
    assert temp < 0.01 * pool or temp < 2 * rows, f"temporary {temp} of a pool of {pool}"
    assert "tpu_custom_call" in compiled.as_text(), "no Mosaic kernel"
    sized = pool_sized(compiled.as_text(), one_layer(pages))
    assert not sized, f"instructions of the pool's size: {sized}"
    told = f"pool {pool >> 20} MiB, in place {alias >> 20} MiB, temporary {temp / 1024:.0f} KiB, "
    if program.unknown:
        return f"{told}bytes not bounded: {program.unknown}"
    moved, formula = bytes_moved(compiled, program)
    kept = (
        kept_bytes(compiled.as_text()) if program.rows and moved > program.most[0] * formula else 0
    )
    told += f"bytes / formula {moved / formula:.2f}"
    if kept:
        told += f", of which {kept / formula:.2f} are temporaries that XLA moves out of VMEM"
    without, in_all = program.most
    assert moved - kept <= without * formula, f"{told}: bytes {moved}, formula {formula}"
    assert moved <= in_all * formula, f"{told}: bytes {moved}, formula {formula}"
    return told


def bytes_moved(compiled: Any, program: Program) -> tuple[int, int]:
    """Bytes that a program moves, and those of its formula."""
    if not program.rows:
        return int((compiled.cost_analysis() or {}).get("bytes accessed", 0)), program.formula
    text, memory = compiled.as_text(), compiled.memory_analysis()
    arguments = argument_bytes(text)
    assert sum(arguments) == memory.argument_size_in_bytes, "the text has other arguments"
    given = sum(arguments[len(jax.tree.leaves(program.args[0])) :])
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return hbm_bytes(text), program.formula + given + results


def missing() -> str | None:
    """Why nothing can be compiled here, if so."""
    major, minor, *_ = jax.__version_info__
    wanted = LIBTPU.get((major, minor))
    if wanted is None:
        return f"no libtpu is known for jax {jax.__version__}"
    try:
        found = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return f"libtpu=={wanted}.* is not installed"
    if not f"{found}.".startswith(f"{wanted}."):
        return f"libtpu {found} does not fit jax {jax.__version__}, which wants {wanted}"
    return None


def main() -> int:
    """Prints a line per compile; 1 if one failed. What cannot run is skipped with the reason."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--only", default="", help="part of a case's name")
    args = parser.parse_args()
    if why := missing():
        print(f"skipped  all TPU cases: {why}")
        return 0
    last, chips, failed = time.monotonic() + 60 * args.minutes, {}, 0
    for chip, name, program in cases():
        if args.only not in f"{chip}, {name}":
            continue
        title, start = f"{chip:6} {name:40}", time.monotonic()
        if start > last:
            print(f"skipped  {title} no time left", flush=True)
            continue
        try:
            if chip not in chips:
                chips[chip] = Chip(chip, CHIPS[chip])
            made = program(chips[chip])
            compiled = chips[chip].compile(made.fn, *made.args, donate=made.donate)
            told = check(compiled, made)
            print(f"ok       {title} {time.monotonic() - start:6.1f} s  {told}", flush=True)
        except Exception as error:  # every case is reported, then all of them count
            failed += 1
            print(f"FAILED   {title} {type(error).__name__}: {str(error)[:400]}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
