"""The Mosaic TPU body of `attention_mass` in interpret mode against the float64 oracle."""

import functools

import jax
import numpy as np
import pytest

from kvjax.pallas_kernels import OPERATIONS, compat, tuning
from kvjax.pallas_kernels.attention_mass import tpu
from kvjax.pallas_kernels.paged_attention import tpu_stream
from tests.pallas_kernels.attention_cases import Heads, Problem, attend, causal, problem
from tests.pallas_kernels.test_attention_mass import mass, segments_of
from tests.pallas_kernels.test_tpu_attention import MIXED, SMOLLM2, packed

SLOW = pytest.mark.slow
TILES = [(300, causal(300, 70)), (40, causal(40, 1)), (200, causal(200, 60))]
CASES = {
    "a mix, everything on": problem(1, SMOLLM2, MIXED, num_tokens=24, tail_words=2, soft_cap=2.0),
    "int8": problem(5, Heads(4, 2, 64), MIXED, page_size=32, physical=np.int8),
    "sequences over several tiles": problem(12, Heads(4, 2, 32), TILES),
}
LONG = {
    "bfloat16, lanes apart": problem(3, Heads(8, 2, 128), MIXED, bfloat16=True),
    "latent": problem(4, Heads(4, 1, 40, latent=32), MIXED),
    "float8": problem(6, Heads(4, 2, 64), MIXED, page_size=32, physical=np.uint8),
    "more query heads than a product's rows": problem(10, Heads(64, 1, 64), MIXED),
    "one query head per KV head": problem(11, Heads(5, 5, 32), MIXED),
}


@pytest.fixture(autouse=True)
def short_blocks():
    """Few pages per block and tokens per tile: small problems have several of both."""
    tuning.try_sizes("paged_attention/tpu_keys", {"keys": 48})
    tuning.try_sizes("paged_attention/tpu_prefill", {"tile": 16})
    yield
    tuning.try_sizes("paged_attention/tpu_keys", None)
    tuning.try_sizes("paged_attention/tpu_prefill", None)


def run(p: Problem, lse, segment_starts, interpret=True):
    call = functools.partial(
        tpu.attention_mass, scale=p.q.shape[-1] ** -0.5, soft_cap=p.soft_cap,
        value_width=p.value_width, interpret=interpret,
    )  # fmt: skip
    quick = {"xla_backend_optimization_level": 0} if interpret is True else None
    p = packed(p)
    return jax.jit(call, compiler_options=quick)(
        p.q, lse, p.pages, p.block_tables, p.query_starts, p.kv_lens, p.lo, p.hi,
        tail_mask=p.tail_mask, segment_starts=segment_starts,
    )  # fmt: skip


def assert_matches(p: Problem, interpret=True) -> None:
    _, lse = attend(p, backend="reference")
    lse = lse.astype(np.float32)
    got = run(p, lse, segments_of(p), interpret)
    want = mass(p, lse, segments_of(p), backend="reference")
    tolerance = 1e-5 if p.pages.k.dtype == np.float32 else 2e-2
    np.testing.assert_allclose(got.columns, want.columns, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(got.segments, want.segments, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=SLOW) for name in LONG)])
def test_the_body_matches_the_oracle(name):
    assert_matches((CASES | LONG)[name])


SMALL = problem(
    20, Heads(4, 2, 32), [(33, causal(33, 1)), (20, [(20, 20)]), (40, [(0, 9), (20, 40)])],
    pages_per_seq=4, tail_words=1,
)  # fmt: skip


@pytest.mark.parametrize("mode", ["eager", "on_wait"])
def test_nothing_races_whenever_copies_happen(mode):
    assert_matches(SMALL, compat.tpu_interpreter(dma_execution_mode=mode))
    assert not compat.tpu_races()


class ForgetsToWait(tpu_stream.PageStream):
    def _wait(self, i, block, slot):
        del i, block, slot


def test_a_missing_wait_for_a_copy_is_caught(monkeypatch):
    monkeypatch.setattr(tpu, "PageStream", ForgetsToWait)
    with pytest.raises(AssertionError):
        assert_matches(SMALL, compat.tpu_interpreter())
    compat.tpu_races()


def test_segments_can_be_left_out():
    _, lse = attend(SMALL, backend="reference")
    assert run(SMALL, lse.astype(np.float32), None).segments is None


def test_split_pages_are_refused_and_a_cpu_is_refused_by_name():
    with pytest.raises(NotImplementedError, match="pages are split"):
        mass(SMALL, np.zeros(SMALL.q.shape[:2], np.float32), segments_of(SMALL), backend="tpu")
    assert OPERATIONS["attention_mass"].explain("tpu")["tpu"] == "tpu: the platform is cpu"
