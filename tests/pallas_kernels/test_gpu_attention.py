"""The Mosaic GPU attention kernels: interpreted, lowered, and on a Hopper GPU against the oracle.

The interpreter has no tensor cores and no register layouts; all else of the kernels runs in it, and
every slot that must not be read is NaN. On a GPU the same problems run as they are.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas_kernels import LayerPages, PackedPages, hopper, paged_attention, tuning
from kvjax.pallas_kernels.compat import gpu_races, interpret_gpu
from kvjax.pallas_kernels.paged_attention import gpu, gpu_blocks
from tests.pallas_kernels.attention_cases import Heads, Problem, attend, causal, problem
from tests.pallas_kernels.gpu_devices import INTERPRETED, LOWERED, ON_HOPPER

SMALL = Heads(2, 1, 64)
MODELS = {
    "SmolLM2": Heads(9, 3, 64),
    "Llama-3-8B": Heads(32, 8, 128),
    "Qwen3": Heads(16, 8, 128),
    "Gemma 3": Heads(8, 4, 256),
}
SCALED = {"int8": np.int8, "float8": np.uint8}
LATENT = {"DeepSeek-V2-Lite": Heads(16, 1, 576, 512), "DeepSeek-V3": Heads(128, 1, 576, 512)}
MIXED = [  # a chunk of a prefill, decode, nothing, and queries with a gap between their intervals
    (150, causal(150, 70)),
    (17, causal(17, 1)),
    (0, []),
    (90, [(0, 3), (70, 88)]),
    (1, causal(1, 1)),
]
LENGTHS = [
    (0, []),
    (1, causal(1, 1)),
    (63, causal(63, 63)),
    (64, causal(64, 1)),
    (65, causal(65, 2)),
    (330, causal(330, 200)),
    (300, causal(300, 1)),
]
OPTIONS = {
    "plain": {},
    "cap": {"soft_cap": 1.5},
    "sinks": {"sinks": True},
    "tail": {"tail_words": 2},
    "all": {"soft_cap": 4.0, "sinks": True, "tail_words": 1},
}


def run(p: Problem, *, max_query_len: int | None = None, interpret=None):
    """Output and lse of the gpu backend."""

    @jax.jit
    def call(q, pages, tables, starts, kv_lens, lo, hi, tail_mask, sinks):
        return gpu.paged_attention(
            q, pages, tables, starts, kv_lens, lo, hi, scale=q.shape[-1] ** -0.5,
            tail_mask=tail_mask, sinks=sinks, soft_cap=p.soft_cap, value_width=p.value_width,
            max_query_len=max_query_len, return_lse=True, interpret=interpret,
        )  # fmt: skip

    o, lse = call(
        p.q, p.pages, p.block_tables, p.query_starts, p.kv_lens, p.lo, p.hi, p.tail_mask, p.sinks
    )
    return np.asarray(o), np.asarray(lse)


def assert_matches(p: Problem, got) -> None:
    """Real rows within 1e-2 of the float64 oracle, padding rows finite."""
    (o, lse), (want_o, want_lse), n = got, attend(p, backend="reference"), p.num_tokens
    assert np.isfinite(o).all()
    np.testing.assert_allclose(o[:n], want_o[:n], rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(lse[:n], want_lse[:n], rtol=1e-2, atol=1e-2)


def interpreted(p: Problem, **options):
    """The problem in the interpreter, where no two threads race."""
    got = run(p, interpret=interpret_gpu(detect_races=True), **options)
    assert not gpu_races()
    return got


@INTERPRETED
@pytest.mark.slow
def test_interpreted_decode_matches_the_oracle():
    seqs = [(70, causal(70, 1, window=60)), (0, []), (16, causal(16, 1))]
    p = problem(1, SMALL, seqs, pages_per_seq=5, num_tokens=3, bfloat16=True)
    assert_matches(p, interpreted(p, max_query_len=1))


@INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_interpreted_decode_and_prefill_match_the_oracle(page_size):
    p = problem(
        2, SMALL, MIXED, page_size=page_size, pages_per_seq=160 // page_size + 2, num_tokens=76,
        bfloat16=True,
    )  # fmt: skip
    assert_matches(p, interpreted(p))


@INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_interpreted_trees_caps_and_sinks_match_the_oracle(options):
    seqs = [(150, causal(150, 3, window=100)), (17, causal(17, 1)), (40, [(5, 40)] * 4)]
    p = problem(3, SMALL, seqs, pages_per_seq=12, num_tokens=9, bfloat16=True, **options)
    assert_matches(p, interpreted(p, max_query_len=4))


@INTERPRETED
@pytest.mark.slow
def test_interpreted_splits_and_whole_walks_give_the_same(monkeypatch):
    """Few tiles are split over their keys, many are not."""
    p = problem(4, SMALL, [(150, causal(150, 70))], pages_per_seq=12, bfloat16=True)
    monkeypatch.setattr(gpu, "_FILL", 0)
    assert_matches(p, interpreted(p))


@INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize("physical", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("page_size", [32, 64, 128])
def test_interpreted_scaled_pages_match_the_oracle(page_size, physical):
    p = problem(
        11, SMALL, MIXED, page_size=page_size, pages_per_seq=160 // page_size + 2, num_tokens=76,
        physical=physical,
    )  # fmt: skip
    assert_matches(p, interpreted(p))


@INTERPRETED
@pytest.mark.slow
@pytest.mark.parametrize("physical", [np.uint16, *SCALED.values()], ids=["bfloat16", *SCALED])
@pytest.mark.parametrize("widest", [64, 256], ids=["halves of the channels", "whole"])
@pytest.mark.parametrize("max_query_len", [4, None], ids=["decode", "mixed"])
def test_interpreted_latent_pages_match_the_oracle(monkeypatch, widest, physical, max_query_len):
    """XLA:CPU runs widths of 576 in threads of its own, which the interpreter has none left of."""
    monkeypatch.setattr(gpu, "_WIDEST", widest)
    seqs = [(150, causal(150, 3, window=100)), (17, causal(17, 1)), (40, [(5, 40)] * 4)]
    p = problem(
        12, Heads(4, 1, 192, latent=128), seqs, page_size=32, pages_per_seq=6, num_tokens=9,
        physical=physical, tail_words=1,
    )  # fmt: skip
    assert_matches(p, interpreted(p, max_query_len=max_query_len))


@INTERPRETED
@pytest.mark.slow
def test_interpreted_heads_beyond_one_tile_match_the_oracle():
    seqs = [(20, causal(20, 1)), (40, causal(40, 2))]
    p = problem(13, Heads(66, 1, 64), seqs, pages_per_seq=5, bfloat16=True)
    assert_matches(p, interpreted(p))


@INTERPRETED
@pytest.mark.slow
def test_a_missing_wait_for_a_copy_is_a_race(monkeypatch):
    """A planted bug: keys are multiplied before their copies have landed."""
    wait, attend_blocks, forgotten = gpu_blocks.plgpu.barrier_wait, gpu_blocks.attend_blocks, []

    def forgetful(ref):
        if not any(getattr(ref, "ref", ref) is each for each in forgotten):
            wait(ref)

    def planted(walk, s, *rest):
        forgotten.append(s.k_ready)
        return attend_blocks(walk, s, *rest)

    monkeypatch.setattr(gpu_blocks.plgpu, "barrier_wait", forgetful)
    monkeypatch.setattr(gpu_blocks, "attend_blocks", planted)
    p = problem(1, SMALL, [(70, causal(70, 1))], pages_per_seq=5, bfloat16=True)
    with pytest.raises((AssertionError, RuntimeError), match=r"gpu_races|RACE"):
        interpreted(p, max_query_len=1)


LOWERING = [
    *(pytest.param(heads, np.uint16, id=name) for name, heads in (MODELS | LATENT).items()),
    pytest.param(MODELS["Llama-3-8B"], np.int8, id="Llama-3-8B, int8"),
    pytest.param(LATENT["DeepSeek-V3"], np.uint8, id="DeepSeek-V3, float8"),
]


@pytest.mark.parametrize(("heads", "physical"), LOWERING)
@pytest.mark.parametrize("max_query_len", [1, None], ids=["decode", "mixed"])
@LOWERED
def test_kernels_lower_for_cuda_without_one(heads, physical, max_query_len):
    seqs, tokens = 4, 4 if max_query_len else 300

    def call(q, pages, tables, starts, kv_lens, lo, hi, tail_mask, sinks):
        return paged_attention(
            q, pages, tables, starts, kv_lens, lo, hi, scale=0.1, tail_mask=tail_mask,
            sinks=sinks, soft_cap=30.0, max_query_len=max_query_len,
            value_width=heads.latent, backend="gpu",
        )  # fmt: skip

    pool: Any = jax.ShapeDtypeStruct((64, heads.kv, 64, heads.width), physical)
    scaled = physical != np.uint16
    scale: Any = jax.ShapeDtypeStruct(pool.shape[:3], np.float32) if scaled else None
    pages = LayerPages(pool, None, scale) if heads.latent else LayerPages(pool, pool, scale, scale)
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=np.int32)
    with hopper.ahead_of_time():
        exported = jax.export.export(jax.jit(call), platforms=["cuda"])(
            jax.ShapeDtypeStruct((tokens, heads.q, heads.width), jnp.bfloat16),
            pages, ints((seqs, 16)), ints((seqs + 1,)), ints((seqs,)), ints((tokens,)),
            ints((tokens,)), jax.ShapeDtypeStruct((tokens, 2), np.uint32),
            jax.ShapeDtypeStruct((heads.q,), np.float32),
        )  # fmt: skip
    assert exported.mlir_module().count("paged_attention_") >= (1 if max_query_len else 2)


def _refusing(**changes):
    """A problem of bfloat16 pages with something changed."""
    made = {"heads": SMALL, "page_size": 16, "tail_words": 0} | changes
    heads = made.pop("heads")
    return problem(5, heads, [(20, causal(20, 2))], pages_per_seq=2, bfloat16=True, **made)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"heads": Heads(2, 1, 32)}, "head_dim=32 is no multiple of 16 in 64..256"),
        ({"heads": Heads(2, 1, 72)}, "head_dim=72"),
        ({"heads": Heads(2, 1, 320)}, "head_dim=320"),
        ({"heads": Heads(2, 1, 96, latent=64)}, "latent keys of 96"),
        ({"heads": Heads(2, 1, 640, latent=512)}, "latent keys of 640"),
        ({"heads": Heads(2, 1, 128, latent=80)}, "value_width=80"),
        ({"heads": Heads(2, 1, 576, latent=320)}, "value_width=320 has no halves"),
        ({"heads": Heads(2, 1, 576, latent=512), "tail_words": 7}, "7 words exceed 6"),
        ({"page_size": 48}, "page_size=48"),
        ({"tail_words": 9}, "9 words exceed 8"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_do_is_refused_with_the_reason(changes, why):
    with pytest.raises(NotImplementedError, match=why), hopper.ahead_of_time():
        run(_refusing(**changes))


@pytest.mark.parametrize(
    ("dtype", "why"),
    [
        (np.float32, "tf32"),
        (np.int32, "int32, not"),
        (np.int8, "int8 pages without"),
        (np.uint8, "float8_e4m3fn pages without"),
    ],
)
def test_pages_of_other_dtypes_are_refused(dtype, why):
    p = _refusing()
    pool: Any = np.zeros(p.pages.k.shape, dtype)
    p = dataclasses.replace(p, pages=LayerPages(pool, pool))
    with pytest.raises(NotImplementedError, match=why), hopper.ahead_of_time():
        run(p)


def test_scales_too_short_for_a_copy_are_refused():
    p = problem(5, SMALL, [(20, causal(20, 2))], pages_per_seq=2, physical=np.int8)
    with pytest.raises(NotImplementedError, match="page_size=16: scales"), hopper.ahead_of_time():
        run(p)


@pytest.mark.parametrize(
    ("heads", "sizes", "bytes_needed"),
    [
        (MODELS["Llama-3-8B"], {"block": 128, "stages": 8}, 561424),
        (LATENT["DeepSeek-V3"], {"block": 64, "stages": 3}, 303168),
    ],
    ids=["Llama-3-8B", "DeepSeek-V3"],
)
def test_blocks_that_exceed_shared_memory_are_refused_before_anything_is_compiled(
    heads, sizes, bytes_needed
):
    """The bytes are those that Mosaic GPU of jax 0.12 names when it fails on such a kernel."""
    p = problem(5, heads, [(20, causal(20, 1))], page_size=64, pages_per_seq=2, bfloat16=True)
    tuning.try_sizes("paged_attention/gpu_decode", sizes)
    why = f"gpu: block={sizes['block']}, stages={sizes['stages']}.* need {bytes_needed} bytes"
    try:
        with pytest.raises(NotImplementedError, match=why), hopper.ahead_of_time():
            run(p, max_query_len=1)
    finally:
        tuning.try_sizes("paged_attention/gpu_decode", None)


def test_packed_pages_are_refused():
    packed: Any = np.zeros((4, 1, 16, 128), np.uint16)
    p: Any = dataclasses.replace(_refusing(), pages=PackedPages(packed))
    with pytest.raises(NotImplementedError, match="PackedPages"), hopper.ahead_of_time():
        run(p)


@INTERPRETED
def test_a_cpu_is_refused_by_name():
    with pytest.raises(NotImplementedError, match="the platform is cpu"):
        run(_refusing())


def _on_gpu(*values):
    return [pytest.param(v, marks=ON_HOPPER, id=str(v)) for v in values]


@pytest.mark.parametrize("heads", _on_gpu(*MODELS.values(), Heads(7, 1, 80), Heads(4, 4, 96)))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention_on_a_gpu_matches_the_oracle(heads, options):
    p = problem(6, heads, LENGTHS, num_tokens=280, bfloat16=True, **options)
    assert_matches(p, run(p))


@pytest.mark.parametrize("heads", _on_gpu(*MODELS.values()))
@pytest.mark.parametrize("physical", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("page_size", [32, 64, 128])
def test_scaled_pages_on_a_gpu_match_the_oracle(heads, physical, page_size):
    p = problem(
        14, heads, LENGTHS, page_size=page_size, pages_per_seq=384 // page_size, num_tokens=280,
        physical=physical, **OPTIONS["all"],
    )  # fmt: skip
    assert_matches(p, run(p))


@pytest.mark.parametrize("heads", _on_gpu(*LATENT.values(), Heads(4, 1, 320, 256)))
@pytest.mark.parametrize("physical", [np.uint16, *SCALED.values()], ids=["bfloat16", *SCALED])
def test_latent_pages_on_a_gpu_match_the_oracle(heads, physical):
    p = problem(
        15, heads, MIXED, page_size=64, pages_per_seq=4, num_tokens=80, physical=physical,
        tail_words=1,
    )  # fmt: skip
    assert_matches(p, run(p))


@pytest.mark.parametrize("page_size", _on_gpu(8, 16, 32, 64, 128, 256))
def test_page_sizes_on_a_gpu_match_the_oracle(page_size):
    p = problem(
        7, MODELS["Llama-3-8B"], MIXED, page_size=page_size, pages_per_seq=160 // page_size + 2,
        num_tokens=80, bfloat16=True,
    )  # fmt: skip
    assert_matches(p, run(p))


@pytest.mark.parametrize("window", _on_gpu(1, 21, 1024))
def test_windows_and_long_contexts_on_a_gpu_match_the_oracle(window):
    seqs = [(5000, causal(5000, 1, window)), (1025, causal(1025, 8, window)), (3, causal(3, 3))]
    p = problem(8, MODELS["Gemma 3"], seqs, page_size=64, pages_per_seq=80, bfloat16=True)
    assert_matches(p, run(p))


@pytest.mark.parametrize("max_query_len", _on_gpu(1, 7))
def test_short_queries_on_a_gpu_match_the_oracle(max_query_len):
    seqs = [(n, causal(n, min(n, max_query_len))) for n in (1, 40, 2100)]
    p = problem(9, MODELS["SmolLM2"], seqs, page_size=64, pages_per_seq=40, bfloat16=True)
    assert_matches(p, run(p, max_query_len=max_query_len))


@pytest.mark.parametrize("options", _on_gpu(*OPTIONS))
def test_a_row_on_a_gpu_has_the_same_bits_alone_and_in_a_batch(options):
    seqs = [(n, causal(n, 1)) for n in (1, 17, 300, 330)]
    p = problem(10, SMALL, seqs, bfloat16=True, **OPTIONS[options])
    o, lse = run(p, max_query_len=1)
    for row in range(len(seqs)):
        alone_o, alone_lse = run(p.alone([row]), max_query_len=1)
        assert np.array_equal(o[row], alone_o[0])
        assert np.array_equal(lse[row], alone_lse[0])
