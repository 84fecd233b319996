"""Repositioning: as the specification says, in place, and equal to a fresh rotation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvjax.pallas_kernels as kernels
from kvjax.pallas_kernels import (
    OPERATIONS,
    LayerPages,
    LowRank,
    pack_pages,
    rotary_tables,
    split_pages,
)
from kvjax.pallas_kernels.page_ops.reference import decode, encode

PAGES, SIZE, HEADS, WIDTH, V_WIDTH = 5, 4, 3, 16, 8
SLOTS = PAGES * SIZE
TOKENS = 6
KINDS = {"f32": np.float32, "bf16": np.uint16, "int8": np.int8, "float8": np.uint8}
ROTARIES = {"full": (0, 8), "partial": (0, 4), "latent": (12, 2)}  # first channel, pairs
reposition: Any = kernels.reposition  # they take numpy too
rotary_shift: Any = kernels.rotary_shift
gather_slots: Any = kernels.gather_slots
write_slots: Any = kernels.write_slots
STATIC = ("frame", "rotary_offset", "backend")
jit_reposition = jax.jit(reposition, static_argnames=STATIC)
jit_shift = jax.jit(rotary_shift, static_argnames=("rotary_offset", "backend"))


def random_pages(seed: int, physical: Any, latent: bool = False, readable=None) -> LayerPages:
    """Standard normal numbers in the slots of `readable` (None: all), NaN in the others."""
    rng = np.random.default_rng(seed)

    def pool(width: int) -> Any:
        x = rng.standard_normal((PAGES, HEADS, SIZE, width))
        if readable is not None:
            inside = np.isin(np.arange(SLOTS), readable).reshape(PAGES, 1, SIZE, 1)
            x = np.where(inside, x, np.nan)
        return encode(x, np.dtype(physical))

    k, k_scale = pool(WIDTH)
    v, v_scale = (None, None) if latent else pool(V_WIDTH)
    return LayerPages(k, v, k_scale, v_scale)


def tables(seed: int, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    shifts = np.random.default_rng(seed).integers(-2000, 2000, TOKENS)
    return rotary_tables(shifts, 10000.0 ** -(np.arange(pairs) / pairs))


def patches(seed: int, kind: str, latent: bool) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def patch(width: int) -> Any:
        left, right = rng.standard_normal((TOKENS, 2)), rng.standard_normal((2, HEADS, width))
        low = LowRank(jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32))
        return low if kind == "low rank" else jnp.einsum("tr,rhw->thw", *low)

    if kind == "none":
        return {}
    return {"patch_k": patch(WIDTH)} | ({} if latent else {"patch_v": patch(V_WIDTH)})


def assert_close_pages(got: LayerPages, want: LayerPages, moved: np.ndarray) -> None:
    """Moved keys to one step of the dtype; every other slot of the pool bit for bit."""
    others = np.setdiff1d(np.arange(SLOTS), moved)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        a, b = (np.moveaxis(x, 2, 1).reshape(SLOTS, -1) for x in (a, b))
        assert a[others].tobytes() == b[others].tobytes()
    step = {np.dtype(np.float32): 1e-6, np.dtype(np.uint16): 2**-8, np.dtype(np.int8): 2**-7,
            np.dtype(np.uint8): 2**-3}[got.k.dtype]  # fmt: skip
    for a, a_scale, b, b_scale in (
        (got.k, got.k_scale, want.k, want.k_scale),
        (got.v, got.v_scale, want.v, want.v_scale),
    ):
        if a is None:
            continue
        a, b = decode(a, a_scale), decode(b, b_scale)
        limit = step * np.nan_to_num(np.abs(b)).max()
        np.testing.assert_allclose(a, b, rtol=step, atol=limit)


moves = st.tuples(
    st.lists(st.integers(0, SLOTS - 1), min_size=TOKENS, max_size=TOKENS),
    st.permutations(range(SLOTS)).map(lambda slots: slots[:TOKENS]),
    st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS),
)


@settings(max_examples=60, deadline=None)
@given(
    moves,
    st.sampled_from(list(KINDS)),
    st.sampled_from(list(ROTARIES)),
    st.sampled_from(["none", "dense", "low rank"]),
    st.sampled_from(["source", "target"]),
)
def test_it_is_the_specification_and_nobody_else_is_read_or_written(
    move, kind, rotary, patch, frame
):
    src, dst, kept = move
    offset, pairs = ROTARIES[rotary]
    src = np.array(src, np.int32)
    dst = np.where(kept, dst, -1).astype(np.int32)
    pages = random_pages(1, KINDS[kind], rotary == "latent", src[dst >= 0])
    options = {"frame": frame, "rotary_offset": offset} | patches(2, patch, rotary == "latent")
    got = jit_reposition(pages, src, dst, *tables(3, pairs), **options)
    want = reposition(pages, src, dst, *tables(3, pairs), **options, backend="reference")
    assert_close_pages(got, want, dst[dst >= 0])


@settings(max_examples=40, deadline=None)
@given(
    moves,
    st.sampled_from(list(KINDS)),
    st.sampled_from(list(ROTARIES)),
    st.sampled_from(["none", "dense", "low rank"]),
    st.sampled_from(["source", "target"]),
)
def test_packed_pages_move_as_split_ones_do(move, kind, rotary, patch, frame):
    src, dst, kept = move
    offset, pairs = ROTARIES[rotary]
    src = np.array(src, np.int32)
    dst = np.where(kept, dst, -1).astype(np.int32)
    latent = rotary == "latent"
    pages = random_pages(1, KINDS[kind], latent, src[dst >= 0])
    options = {"frame": frame, "rotary_offset": offset} | patches(2, patch, latent)
    got = jit_reposition(pack_pages(pages), src, dst, *tables(3, pairs), **options)
    want = reposition(pages, src, dst, *tables(3, pairs), **options, backend="reference")
    assert_close_pages(split_pages(got, WIDTH, None if latent else V_WIDTH), want, dst[dst >= 0])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_keys_are_shifted_in_place_beside_values_that_stay(kind):
    pages = random_pages(7, KINDS[kind])
    slots = np.array([3, 19, -1, 0, 8, -1], np.int32)
    got = split_pages(jit_shift(pack_pages(pages), slots, *tables(8, 8)), WIDTH, V_WIDTH)
    want = jit_shift(pages, slots, *tables(8, 8))
    assert_close_pages(got, want, slots[slots >= 0])
    np.testing.assert_array_equal(got.v, pages.v)


def test_a_packed_scaled_head_that_may_be_latent_is_refused():
    pages = pack_pages(jax.tree.map(lambda x: x[:, :1], random_pages(7, np.int8)))
    slots = np.arange(TOKENS, dtype=np.int32)
    with pytest.raises(ExceptionGroup) as caught:
        reposition(pages, slots, slots, *tables(8, 8))
    assert "may be a key beside its value or latent" in str(caught.value.exceptions[-1])


def test_values_without_a_patch_and_keys_without_a_rotation_keep_their_bits():
    src, dst = np.array([3, 4, 5], np.int32), np.array([9, 2, 3], np.int32)
    cos, sin = np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32)
    for kind in ("f32", "bf16"):
        pages = random_pages(4, KINDS[kind])
        got = jit_reposition(pages, src, dst, cos, sin)
        for pool, before in zip(got, pages, strict=True):
            if pool is not None and before is not None:
                rows = np.asarray(pool)[dst // SIZE, :, dst % SIZE]
                np.testing.assert_array_equal(rows, before[src // SIZE, :, src % SIZE])


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_values_are_moved_and_not_rounded_again(kind):
    pages = random_pages(5, KINDS[kind])
    src, dst = np.array([0, 7], np.int32), np.array([7, 11], np.int32)
    cos, sin = (x[:2] for x in tables(6, 8))
    got = jit_reposition(pages, src, dst, cos, sin)
    want = reposition(pages, src, dst, cos, sin, backend="reference")
    np.testing.assert_array_equal(got.v, want.v)
    if got.v_scale is not None:
        np.testing.assert_array_equal(got.v_scale, want.v_scale)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shift_in_place_is_the_move_to_the_same_slots(kind):
    pages = random_pages(7, KINDS[kind])
    slots = np.array([3, 19, -1, 0, 8, -1], np.int32)
    shifted = jit_shift(pages, slots, *tables(8, 8))
    moved = jit_reposition(pages, slots, slots, *tables(8, 8))
    for a, b in zip(jax.tree.leaves(shifted), jax.tree.leaves(moved), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    np.testing.assert_array_equal(shifted.v, pages.v)


def rotated(k: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Float64 keys as a model would have written them at `positions`."""
    angles = positions[:, None, None] * frequencies
    first, second = np.split(k, 2, axis=-1)
    turned = (first * np.cos(angles) - second * np.sin(angles),
              second * np.cos(angles) + first * np.sin(angles))  # fmt: skip
    return np.concatenate(turned, axis=-1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 30_000), st.integers(0, 30_000))
def test_moved_keys_are_those_of_a_prefill_at_the_new_positions(old, new):
    """The rotation composes: R(new) = R(new - old) R(old), to 1e-5 at any distance."""
    frequencies = 10000.0 ** -(np.arange(8) / 8)
    rng = np.random.default_rng(9)
    k, v = rng.standard_normal((TOKENS, HEADS, WIDTH)), rng.standard_normal((TOKENS, HEADS, 8))
    src, dst = np.arange(TOKENS, dtype=np.int32), np.arange(9, 9 + TOKENS, dtype=np.int32)
    run = np.arange(TOKENS)
    pages = random_pages(10, np.float32)
    pages = write_slots(pages, rotated(k, old + run, frequencies).astype(np.float32), v, src)
    moved = jit_reposition(pages, src, dst, *rotary_tables([new - old] * TOKENS, frequencies))
    np.testing.assert_allclose(
        gather_slots(moved, dst)[0], rotated(k, new + run, frequencies), atol=1e-5
    )


def test_a_patch_of_full_rank_restores_what_another_context_would_have_written():
    """Source frame: the patch was made at the stored positions. Target frame: at the new ones."""
    frequencies = 10000.0 ** -(np.arange(8) / 8)
    rng = np.random.default_rng(11)
    alone, joint = rng.standard_normal((2, TOKENS, HEADS, WIDTH))
    run, far = np.arange(TOKENS), 777 + np.arange(TOKENS)
    src, dst = run.astype(np.int32), (run + 8).astype(np.int32)
    v = rng.standard_normal((TOKENS, HEADS, V_WIDTH)).astype(np.float32)
    pages = write_slots(
        random_pages(12, np.float32), rotated(alone, run, frequencies).astype(np.float32), v, src
    )  # fmt: skip
    cos_sin = rotary_tables([777] * TOKENS, frequencies)
    for frame, positions in (("source", run), ("target", far)):
        patch = rotated(joint - alone, positions, frequencies).astype(np.float32)
        moved = jit_reposition(pages, src, dst, *cos_sin, patch_k=patch, frame=frame)
        want = rotated(joint, far, frequencies)
        np.testing.assert_allclose(gather_slots(moved, dst)[0], want, atol=2e-5)


def writes_before_it_reads(pages, src, dst, cos, sin, **options):
    for t in range(len(src)):
        pages = reposition(pages, src[t : t + 1], dst[t : t + 1], cos[t : t + 1], sin[t : t + 1])
    return pages


def rotates_backwards(pages, src, dst, cos, sin, **options):
    return reposition(pages, src, dst, cos, -sin)


def rotates_the_wrong_channels(pages, src, dst, cos, sin, **options):
    return reposition(pages, src, dst, cos[:, ::-1], sin[:, ::-1])


def keeps_padding(pages, src, dst, cos, sin, **options):
    return reposition(pages, src, np.where(dst < 0, SLOTS - 1, dst), cos, sin)


def patches_in_the_other_frame(pages, src, dst, cos, sin, *, patch_k, frame, **options):
    other = {"source": "target", "target": "source"}[frame]
    return reposition(pages, src, dst, cos, sin, patch_k=patch_k, frame=other)


def leaves_values_behind(pages, src, dst, cos, sin, **options):
    return reposition(pages, src, dst, cos, sin)._replace(v=pages.v)


BUGS = [
    writes_before_it_reads,
    rotates_backwards,
    rotates_the_wrong_channels,
    keeps_padding,
    patches_in_the_other_frame,
    leaves_values_behind,
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_caught(bug):
    pages = random_pages(13, np.float32)
    src = np.array([0, 1, 2, 3, 4, 5], np.int32)
    dst = np.array([1, 2, 3, 9, -1, 0], np.int32)
    options: Any = {"frame": "source"}
    if bug is patches_in_the_other_frame:
        options |= {"patch_k": patches(14, "dense", latent=True)["patch_k"]}
    want: Any = reposition(pages, src, dst, *tables(15, 8), **options, backend="reference")
    assert_close_pages(jit_reposition(pages, src, dst, *tables(15, 8), **options), want, dst)
    operation = OPERATIONS["reposition"]
    operation.register(bug.__name__, bug)
    try:
        wrong: Any = reposition(pages, src, dst, *tables(15, 8), **options, backend=bug.__name__)
        with pytest.raises(AssertionError):
            assert_close_pages(wrong, want, dst)
    finally:
        del operation.implementations[bug.__name__]


@pytest.mark.parametrize("layout", ["split", "packed"])
@pytest.mark.parametrize("operation", ["move", "shift", "patch"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_donated_pool_is_updated_in_place(operation, kind, layout):
    """Result aliases the whole pool, and temporaries stay below one per cent of it."""
    shape = (4096, 3, 16, 64)
    scale: Any = None
    pool: Any = jax.ShapeDtypeStruct(shape, KINDS[kind])
    if kind in ("int8", "float8"):
        scale = jax.ShapeDtypeStruct(shape[:3], jnp.float32)
    pages: Any = LayerPages(pool, pool, scale, scale)
    if layout == "packed":
        pages = jax.eval_shape(pack_pages, pages)
    slots, table = jax.ShapeDtypeStruct((8,), np.int32), jax.ShapeDtypeStruct((8, 32), np.float32)
    if operation == "shift":
        lowered = jax.jit(rotary_shift, donate_argnums=0).lower(pages, slots, table, table)
    else:
        patch: Any = jax.ShapeDtypeStruct((8, 3, 64), np.float32)
        options = {"patch_k": patch, "patch_v": patch} if operation == "patch" else {}
        lowered = jax.jit(reposition, donate_argnums=0).lower(
            pages, slots, slots, table, table, **options
        )
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pages))
    assert memory.alias_size_in_bytes == num_bytes
    assert memory.temp_size_in_bytes < 0.01 * num_bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dst_slots": np.zeros(5, np.int32)}, "as many sources"),
        ({"cos": np.zeros((5, 8), np.float32)}, "expected cos"),
        ({"sin": np.zeros((6, 4), np.float32)}, "cos and sin differ"),
        ({"rotary_offset": 2}, "rotary_offset=2"),
        ({"frame": "both"}, "frame must be"),
        ({"patch_k": np.zeros((6, 3, 8), np.float32)}, "patch_k must be"),
        ({"patch_v": np.zeros((6, 3, 16), np.float32)}, "patch_v must be"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_arguments_that_do_not_fit_are_refused_with_their_values(change, message):
    slots = np.zeros(6, np.int32)
    cos, sin = tables(16, 8)
    arguments: Any = {"src_slots": slots, "dst_slots": slots, "cos": cos, "sin": sin} | change
    with pytest.raises(ValueError, match=message):
        reposition(random_pages(17, np.float32), **arguments)


def test_a_patch_of_values_needs_values():
    slots = np.zeros(6, np.int32)
    with pytest.raises(ValueError, match="hold no values"):
        reposition(
            random_pages(18, np.float32, latent=True), slots, slots, *tables(19, 8),
            patch_v=np.zeros((6, 3, 8), np.float32),
        )  # fmt: skip
