"""What `kvjax bench kernels` times: each case builds subjects that do the same work."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from kvjax.pallas_kernels import (
    AttentionMass,
    LayerPages,
    PackedPages,
    Pages,
    attention_mass,
    cascade_attention,
    copy_pages,
    paged_attention,
    rotary_shift,
    rotary_tables,
)
from kvjax.pallas_kernels.page_ops import packed_width


@dataclasses.dataclass(frozen=True)
class Heads:
    """Head counts and width of one attention layer."""

    q: int
    kv: int
    width: int


LLAMA3_8B, SMOLLM2 = Heads(32, 8, 128), Heads(9, 3, 64)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the cases are on one kind of device."""

    heads: Heads
    page_size: int
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prefills: tuple[int, ...]
    cascade: tuple[int, int, int]  # requests, shared prefix, tokens after it
    recompute: int  # context of which 15 % is recomputed
    moved: int  # tokens shifted, and copied as whole pages
    compared: tuple[int, int]  # batch and context where other implementations join
    copy_bytes: int
    matmul: int
    packed: bool = False  # pages as a TPU keeps them


GPU = Sizes(LLAMA3_8B, 64, (1, 4, 16, 64), (1024, 4096, 16384), (2048, 8192), (32, 16384, 128),
            16384, 65536, (16, 4096), 2**30, 8192)  # fmt: skip
CPU = Sizes(SMOLLM2, 16, (1, 4, 16, 64), (1024, 4096, 16384), (512, 2048), (32, 16384, 128),
            16384, 16384, (8, 2048), 2**28, 2048)  # fmt: skip
TPU = dataclasses.replace(GPU, packed=True)
MASS_TOKENS, MASS_SEGMENTS = 64, 8  # a question over retrieved chunks
QUICK = {"batches": (1, 16), "contexts": (1024, 4096), "recompute": 4096}


@dataclasses.dataclass
class Subject:
    """One implementation of a case: `step(constants, carry)` is one execution.

    Each execution depends on the one before, so that a compiled loop of them can drop none.
    `bytes` and `flops` are what the task needs at least, whoever does it.
    """

    name: str
    step: Callable[[Any, Any], Any]
    constants: Any
    carry: Any
    bytes: float
    flops: float = 0.0


@dataclasses.dataclass
class Case:
    """Subjects to be compared; `build` makes them, so that one case's arrays exist at a time."""

    name: str
    parameters: dict[str, Any]
    build: Callable[[], list[Subject]]
    compare: bool = False  # other libraries join
    heads: Heads | None = None


def cases(sizes: Sizes, dtype: str) -> Iterator[Case]:
    """All cases in order; `dtype` is that of queries and pages."""
    h = sizes.heads
    for batch in sizes.batches:
        for context in sizes.contexts:
            yield Case(
                "decode", {"batch": batch, "context": context},
                lambda b=batch, c=context: [decode(sizes, dtype, b, c)],
            )  # fmt: skip
    batch, context = sizes.compared
    yield Case(
        "decode, compared", {"batch": batch, "context": context},
        lambda: [decode(sizes, dtype, batch, context)], compare=True, heads=h,
    )  # fmt: skip
    for tokens in sizes.prefills:
        yield Case(
            "prefill", {"tokens": tokens}, lambda t=tokens: [prefill(sizes, dtype, t)],
            compare=True, heads=h,
        )  # fmt: skip
    requests, prefix, suffix = sizes.cascade
    yield Case(
        "shared prefix", {"requests": requests, "prefix": prefix, "suffix": suffix},
        lambda: shared_prefix(sizes, dtype),
    )  # fmt: skip
    yield Case("rotary_shift", {"tokens": sizes.moved}, lambda: [shift(sizes, dtype)])
    yield Case("copy_pages", {"tokens": sizes.moved}, lambda: [copy(sizes, dtype)])
    yield Case(
        "recompute 15 %", {"context": sizes.recompute},
        lambda: [recompute(sizes, dtype), prefill(sizes, dtype, sizes.recompute)],
    )  # fmt: skip
    yield Case(
        "attention_mass", {"tokens": MASS_TOKENS, "context": sizes.recompute},
        lambda: [mass(sizes, dtype)],
    )  # fmt: skip


def numbers(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """Standard normal numbers; a pattern repeats, so that gigabytes are made quickly."""
    size = int(np.prod(shape))
    some = np.random.default_rng(seed).standard_normal(min(size, 2**20)).astype(np.float32)
    cast = some.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    return np.resize(cast, shape)


def pools(sizes: Sizes, pages: int, dtype: str) -> Pages:
    """Pages full of numbers, bfloat16 as its bits, as the engine holds them."""
    h = sizes.heads

    def pool(seed: int, width: int) -> jax.Array:
        x = numbers((pages, h.kv, sizes.page_size, width), dtype, seed)
        return jnp.asarray(x.view(np.uint16) if dtype == "bfloat16" else x)

    if sizes.packed:
        return PackedPages(pool(1, packed_width(h.width, h.width)), None)
    return LayerPages(pool(1, h.width), pool(2, h.width))


def item_size(dtype: str) -> int:
    """Bytes of one number."""
    return 2 if dtype == "bfloat16" else 4


def tables(seqs: int, context: int, page_size: int, shared: int = 0) -> tuple[np.ndarray, int]:
    """Permuted block tables whose first `shared` pages are common, and the pages they use."""
    per_seq = -(-context // page_size)
    total = shared + seqs * (per_seq - shared)
    order = np.random.default_rng(3).permutation(total).astype(np.int32)
    own = order[shared:].reshape(seqs, per_seq - shared)
    return np.concatenate([np.tile(order[:shared], (seqs, 1)), own], axis=1), total


def attend(
    sizes: Sizes, dtype: str, name: str, starts: np.ndarray, lens: np.ndarray, hi: np.ndarray,
    table: np.ndarray, pages: Pages, max_query_len: int | None, keys: int, **group: Any,
) -> Subject:  # fmt: skip
    """A subject that calls `paged_attention`, or `cascade_attention` for a `group`.

    `keys` are the keys that have to be read.
    """
    h = sizes.heads
    tokens = len(hi)
    q = jnp.asarray(numbers((tokens, h.q, h.width), dtype))
    constants = jax.tree.map(
        jnp.asarray, (pages, table, starts, lens, np.zeros_like(hi), hi, group)
    )

    def step(constants: Any, carry: Any) -> Any:
        pages, table, starts, lens, lo, hi, group = constants
        operation = cascade_attention if group else paged_attention
        o = operation(
            carry[0], pages, table, starts, lens, lo, hi, scale=h.width**-0.5,
            max_query_len=max_query_len, **group,
        )  # fmt: skip
        return after(carry[0], o), o

    start = (q, jnp.zeros((tokens, h.q, h.width), jnp.float32))
    item = item_size(dtype)
    moved = 2 * h.kv * h.width * item * keys + tokens * h.q * h.width * (item + 4)
    return Subject(name, step, constants, start, moved, 4.0 * h.q * h.width * float(hi.sum()))


def after(q: jax.Array, o: jax.Array) -> jax.Array:
    """`q`, but not before `o` is there: one element has zero times one of `o` added."""
    return q.at[(0,) * q.ndim].add((0.0 * o.reshape(-1)[0]).astype(q.dtype))


def decode(sizes: Sizes, dtype: str, batch: int, context: int) -> Subject:
    """A token of each of `batch` sequences over `context` keys."""
    table, used = tables(batch, context, sizes.page_size)
    ones = np.full(batch, context, np.int32)
    return attend(
        sizes, dtype, "kvjax", np.arange(batch + 1, dtype=np.int32), ones, ones, table,
        pools(sizes, used, dtype), 1, batch * context,
    )  # fmt: skip


def prefill(sizes: Sizes, dtype: str, tokens: int) -> Subject:
    """All tokens of one sequence, each over what precedes it."""
    return _rows(sizes, dtype, "kvjax prefill", tokens, np.arange(tokens, dtype=np.int32))


def recompute(sizes: Sizes, dtype: str) -> Subject:
    """15 % of one sequence's tokens, scattered evenly."""
    context = sizes.recompute
    count = max(1, round(0.15 * context))
    rows = np.linspace(0, context - 1, count).astype(np.int32)
    return _rows(sizes, dtype, "kvjax", context, rows)


def _rows(sizes: Sizes, dtype: str, name: str, context: int, rows: np.ndarray) -> Subject:
    table, used = tables(1, context, sizes.page_size)
    return attend(
        sizes, dtype, name, np.array([0, len(rows)], np.int32), np.array([context], np.int32),
        rows + 1, table, pools(sizes, used, dtype), None, context,
    )  # fmt: skip


def shared_prefix(sizes: Sizes, dtype: str) -> list[Subject]:
    """A decode batch on one prefix: read once for all by a cascade, and once per request.

    On a CPU both read it once: `paged_attention` shares by itself there.
    """
    requests, prefix, suffix = sizes.cascade
    context = prefix + suffix
    table, used = tables(requests, context, sizes.page_size, prefix // sizes.page_size)
    pages = pools(sizes, used, dtype)
    starts = np.arange(requests + 1, dtype=np.int32)
    lens = np.full(requests, context, np.int32)
    arguments = (starts, lens, lens, table, pages, 1)
    group = {"group_starts": np.array([0, requests]), "prefix_lens": np.array([prefix])}
    once = prefix + requests * suffix
    without = once if jax.default_backend() == "cpu" else requests * context
    return [
        attend(sizes, dtype, "kvjax cascade", *arguments, once, **group),
        attend(sizes, dtype, "kvjax without", *arguments, without),
    ]


def mass(sizes: Sizes, dtype: str) -> Subject:
    """What the last tokens of one sequence attend to: per key, and per segment of it."""
    h, context = sizes.heads, sizes.recompute
    count = min(MASS_TOKENS, context)
    table, used = tables(1, context, sizes.page_size)
    hi = np.arange(context - count + 1, context + 1, dtype=np.int32)
    constants = jax.tree.map(
        jnp.asarray,
        (
            pools(sizes, used, dtype), table, np.array([0, count], np.int32),
            np.array([context], np.int32), np.zeros_like(hi), hi,
            np.linspace(0, context, MASS_SEGMENTS + 1).astype(np.int32)[None],
        ),
    )  # fmt: skip

    def step(constants: Any, carry: Any) -> Any:
        pages, table, starts, lens, lo, hi, edges = constants
        q, lse = carry[:2]
        got = attention_mass(
            q, lse, pages, table, starts, lens, lo, hi, scale=h.width**-0.5, segment_starts=edges
        )
        return after(q, got.columns), lse, got

    q = jnp.asarray(numbers((count, h.q, h.width), dtype))
    lse = jnp.full((count, h.q), np.log(context), jnp.float32)
    result = AttentionMass(
        jnp.zeros((1, table.shape[1] * sizes.page_size), jnp.float32),
        jnp.zeros((count, MASS_SEGMENTS), jnp.float32),
    )
    item = item_size(dtype)
    moved = h.kv * h.width * item * context + count * h.q * (h.width * item + 4) + 4 * context
    flops = 2.0 * h.q * h.width * float(hi.sum())
    return Subject("kvjax", step, constants, (q, lse, result), moved, flops)


def shift(sizes: Sizes, dtype: str) -> Subject:
    """Keys of whole pages rotated in place."""
    h, n = sizes.heads, sizes.moved
    used = n // sizes.page_size
    pages = pools(sizes, used, dtype)
    order = np.random.default_rng(3).permutation(used).astype(np.int32)
    slots = (order[:, None] * sizes.page_size + np.arange(sizes.page_size)).reshape(-1)
    frequencies = 10000.0 ** -(np.arange(h.width // 2) / (h.width // 2))
    cos, sin = rotary_tables(np.full(n, 17), frequencies)

    def step(constants: Any, carry: Any) -> Any:
        return rotary_shift(carry, *constants)

    constants = jax.tree.map(jnp.asarray, (slots.astype(np.int32), cos, sin))
    moved = 2 * n * h.kv * h.width * item_size(dtype) + 2 * cos.nbytes
    return Subject("kvjax", step, constants, pages, moved, 3.0 * n * h.kv * h.width)


def copy(sizes: Sizes, dtype: str) -> Subject:
    """Whole pages copied to others of the pool."""
    h, n = sizes.heads, sizes.moved // sizes.page_size
    pages = pools(sizes, 2 * n, dtype)
    order = np.random.default_rng(3).permutation(2 * n).astype(np.int32)

    def step(constants: Any, carry: Any) -> Any:
        return copy_pages(carry, *constants)

    moved = 4 * n * sizes.page_size * h.kv * h.width * item_size(dtype)
    constants = jax.tree.map(jnp.asarray, (order[:n], order[n:]))
    return Subject("kvjax", step, constants, pages, moved)
