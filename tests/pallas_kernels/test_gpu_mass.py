"""The Mosaic GPU body of `attention_mass`: interpreted, lowered, and on a Hopper GPU."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels import OPERATIONS, LayerPages, PackedPages, attention_mass, hopper
from kvjax.pallas_kernels.attention_mass import gpu, gpu_tiles
from kvjax.pallas_kernels.compat import gpu_races, interpret_gpu
from tests.pallas_kernels.attention_cases import Heads, Problem, attend, causal, problem
from tests.pallas_kernels.gpu_devices import INTERPRETED, LOWERED, ON_HOPPER
from tests.pallas_kernels.test_attention_mass import mass, segments_of
from tests.pallas_kernels.test_gpu_attention import (
    LATENT,
    LENGTHS,
    LOWERING,
    MIXED,
    MODELS,
    OPTIONS,
    SCALED,
    SMALL,
)

SHORT = [(150, causal(150, 40)), (17, causal(17, 1)), (0, []), (90, [(0, 3), (70, 88)])]


def run(p: Problem, lse, segment_starts, interpret=None) -> Any:
    @jax.jit
    def call(q, lse, pages, tables, starts, kv_lens, lo, hi, edges, tail_mask):
        return gpu.attention_mass(
            q, lse, pages, tables, starts, kv_lens, lo, hi, scale=q.shape[-1] ** -0.5,
            segment_starts=edges, tail_mask=tail_mask, soft_cap=p.soft_cap,
            value_width=p.value_width, interpret=interpret,
        )  # fmt: skip

    return call(
        p.q, lse, p.pages, p.block_tables, p.query_starts, p.kv_lens, p.lo, p.hi, segment_starts,
        p.tail_mask,
    )  # fmt: skip


def assert_matches(p: Problem, interpret=None) -> None:
    """Columns and segments within 1e-2 of the float64 oracle, relative to a row's sum of 1."""
    _, lse = attend(dataclasses.replace(p, sinks=None), backend="reference")
    lse = lse.astype(np.float32)
    got = run(p, lse, segments_of(p), interpret)
    want = mass(p, lse, segments_of(p), backend="reference")
    np.testing.assert_allclose(got.columns, want.columns, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(got.segments, want.segments, rtol=1e-2, atol=1e-2)


def interpreted(p: Problem) -> None:
    """The problem in the interpreter, where no two threads race."""
    assert_matches(p, interpret_gpu(detect_races=True))
    assert not gpu_races()


@INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_interpreted_mass_matches_the_oracle(page_size):
    p = problem(
        2, SMALL, SHORT, page_size=page_size, pages_per_seq=160 // page_size + 2, num_tokens=46,
        bfloat16=True,
    )  # fmt: skip
    interpreted(p)


@INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize("options", [{"tail_words": 2}, {"soft_cap": 1.5}], ids=str)
def test_interpreted_masks_and_caps_match_the_oracle(options):
    seqs = [(150, causal(150, 3, window=100)), (17, causal(17, 1)), (40, [(5, 40)] * 4)]
    interpreted(problem(3, SMALL, seqs, pages_per_seq=12, num_tokens=9, bfloat16=True, **options))


@INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize("physical", SCALED.values(), ids=SCALED)
def test_interpreted_scaled_pages_match_the_oracle(physical):
    p = problem(11, SMALL, SHORT, page_size=32, pages_per_seq=7, num_tokens=46, physical=physical)
    interpreted(p)


@INTERPRETED
@pytest.mark.slow
def test_interpreted_latent_pages_match_the_oracle():
    seqs = [(150, causal(150, 3, window=100)), (17, causal(17, 1)), (40, [(5, 40)] * 4)]
    heads = Heads(4, 1, 192, latent=128)
    interpreted(problem(12, heads, seqs, page_size=32, pages_per_seq=6, bfloat16=True))


@INTERPRETED
@pytest.mark.slow
def test_interpreted_heads_beyond_one_tile_match_the_oracle():
    seqs = [(20, causal(20, 1)), (40, causal(40, 2))]
    interpreted(problem(13, Heads(66, 1, 64), seqs, pages_per_seq=5, bfloat16=True))


@INTERPRETED
@pytest.mark.slow
def test_interpreted_mass_in_turns_and_whole_walks_is_the_same(monkeypatch):
    """Little memory for column sums, and nothing to gain from splits."""
    monkeypatch.setattr(gpu, "_MOST", 1)
    monkeypatch.setattr(gpu, "_FILL", 1)
    p = problem(4, SMALL, [(150, causal(150, 70)), (9, causal(9, 2))], bfloat16=True)
    interpreted(p)


@INTERPRETED
@pytest.mark.slow
def test_a_missing_wait_for_a_copy_is_a_race(monkeypatch):
    """A planted bug: keys are multiplied before their copies have landed."""
    wait, walk_blocks, forgotten = gpu_tiles.plgpu.barrier_wait, gpu_tiles._walk_blocks, []

    def forgetful(ref):
        if not any(getattr(ref, "ref", ref) is each for each in forgotten):
            wait(ref)

    def planted(walk, s, *rest):
        forgotten.append(s.k_ready)
        return walk_blocks(walk, s, *rest)

    monkeypatch.setattr(gpu_tiles.plgpu, "barrier_wait", forgetful)
    monkeypatch.setattr(gpu_tiles, "_walk_blocks", planted)
    with pytest.raises((AssertionError, RuntimeError), match=r"gpu_races|RACE|nan location"):
        interpreted(problem(1, SMALL, [(70, causal(70, 1))], pages_per_seq=5, bfloat16=True))


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "physical"), LOWERING)
@LOWERED
def test_the_kernel_lowers_for_cuda_without_one(heads, physical):
    seqs, tokens = 4, 60

    def call(q, lse, pages, tables, starts, kv_lens, lo, hi, edges, tail_mask):
        return attention_mass(
            q, lse, pages, tables, starts, kv_lens, lo, hi, scale=0.1, segment_starts=edges,
            tail_mask=tail_mask, soft_cap=30.0, value_width=heads.latent, backend="gpu",
        )  # fmt: skip

    pool: Any = jax.ShapeDtypeStruct((64, heads.kv, 64, heads.width), physical)
    scaled = physical != np.uint16
    scale: Any = jax.ShapeDtypeStruct(pool.shape[:3], np.float32) if scaled else None
    pages = LayerPages(pool, None, scale) if heads.latent else LayerPages(pool, pool, scale, scale)
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=np.int32)
    with hopper.ahead_of_time():
        exported = jax.export.export(jax.jit(call), platforms=["cuda"])(
            jax.ShapeDtypeStruct((tokens, heads.q, heads.width), jnp.bfloat16),
            jax.ShapeDtypeStruct((tokens, heads.q), np.float32),
            pages, ints((seqs, 16)), ints((seqs + 1,)), ints((seqs,)), ints((tokens,)),
            ints((tokens,)), ints((seqs, 9)), jax.ShapeDtypeStruct((tokens, 2), np.uint32),
        )  # fmt: skip
    assert "mosaic_gpu" in exported.mlir_module()


def _refused(p: Problem, segments: int = 3) -> str:
    edges = np.zeros((len(p.kv_lens), segments + 1), np.int32)
    with pytest.raises(NotImplementedError) as refusal, hopper.ahead_of_time():
        run(p, np.zeros(p.q.shape[:2], np.float32), edges)
    return str(refusal.value)


PLAIN = problem(5, SMALL, [(20, causal(20, 2))], pages_per_seq=2, bfloat16=True)


def test_what_the_kernel_cannot_do_is_refused_with_the_reason():
    packed: Any = PackedPages(jnp.zeros((4, 1, 16, 128), jnp.uint16))
    assert "not in split layout" in _refused(dataclasses.replace(PLAIN, pages=packed))
    assert "65 segments exceed 64" in _refused(PLAIN, segments=65)
    p = problem(5, Heads(2, 1, 72), [(20, causal(20, 2))], bfloat16=True)
    assert "head_dim=72" in _refused(p)
    p = problem(5, SMALL, [(20, causal(20, 2))], pages_per_seq=2)
    assert "tf32" in _refused(p)


@INTERPRETED
def test_a_cpu_is_refused_by_name():
    with pytest.raises(NotImplementedError, match="the platform is cpu"):
        run(PLAIN, np.zeros(PLAIN.q.shape[:2], np.float32), segments_of(PLAIN))
    assert OPERATIONS["attention_mass"].explain("gpu")["gpu"] == "gpu: the platform is cpu"


def _on_gpu(*values):
    return [pytest.param(v, marks=ON_HOPPER, id=str(v)) for v in values]


@pytest.mark.parametrize("heads", _on_gpu(*MODELS.values(), Heads(7, 1, 80), Heads(4, 4, 96)))
@pytest.mark.parametrize("options", [OPTIONS[x] for x in ("plain", "cap", "tail")], ids=str)
def test_mass_on_a_gpu_matches_the_oracle(heads, options):
    assert_matches(problem(6, heads, LENGTHS, num_tokens=280, bfloat16=True, **options))


@pytest.mark.parametrize("heads", _on_gpu(*MODELS.values()))
@pytest.mark.parametrize("physical", SCALED.values(), ids=SCALED)
def test_mass_of_scaled_pages_on_a_gpu_matches_the_oracle(heads, physical):
    assert_matches(
        problem(
            14, heads, LENGTHS, page_size=64, pages_per_seq=6, num_tokens=280, physical=physical,
            tail_words=1,
        )
    )  # fmt: skip


@pytest.mark.parametrize("heads", _on_gpu(*LATENT.values(), Heads(4, 1, 320, 256)))
@pytest.mark.parametrize("physical", [np.uint16, *SCALED.values()], ids=["bfloat16", *SCALED])
def test_mass_of_latent_pages_on_a_gpu_matches_the_oracle(heads, physical):
    assert_matches(
        problem(
            15, heads, MIXED, page_size=64, pages_per_seq=4, num_tokens=80, physical=physical,
            tail_words=1,
        )
    )  # fmt: skip


@pytest.mark.parametrize("most", _on_gpu(1, 2**26))
def test_mass_of_a_long_context_on_a_gpu_is_the_same_twice(most, monkeypatch):
    monkeypatch.setattr(gpu, "_MOST", most)
    p = problem(
        8, MODELS["Llama-3-8B"], [(5000, causal(5000, 60))], page_size=64, pages_per_seq=80,
        bfloat16=True,
    )  # fmt: skip
    _, lse = attend(p, backend="reference")
    one, two = (run(p, lse.astype(np.float32), segments_of(p)) for _ in range(2))
    assert np.array_equal(one.columns, two.columns)
    assert np.array_equal(one.segments, two.segments)
    assert_matches(p)
