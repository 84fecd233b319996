"""Every operation as the dispatcher runs it on the device at hand, against its specification.

The suites of the operations go through backends by name; this one asks for what an engine gets. On
an NVIDIA GPU its tests carry the mark `gpu`; on a CPU they run as well, which proves that they can.
"""

from typing import Any

import jax
import numpy as np
import pytest

import kvjax.pallas_kernels as kernels
from kvjax.pallas_kernels import OPERATIONS
from tests.pallas_kernels import test_cascade_attention as cascades
from tests.pallas_kernels import test_page_ops as page_ops
from tests.pallas_kernels import test_reposition as moves
from tests.pallas_kernels.attention_cases import Heads, attend, causal, problem
from tests.pallas_kernels.test_attention_mass import mass, segments_of

_HERE = jax.default_backend()
pytestmark = [
    pytest.mark.parametrize(
        "device",
        [
            pytest.param("cpu", marks=pytest.mark.skipif(_HERE != "cpu", reason="not on a CPU")),
            pytest.param(
                "gpu",
                marks=(
                    pytest.mark.gpu,
                    pytest.mark.skipif(_HERE != "gpu", reason=f"the platform is {_HERE}"),
                ),
            ),
        ],
    )
]
LLAMA = Heads(32, 8, 128)
MIXED = [(150, causal(150, 20)), (17, causal(17, 1)), (0, []), (90, [(0, 3), (70, 88)])]
KINDS = {"bf16": np.uint16, "int8": np.int8, "float8": np.uint8}
SLOTS: Any = np.array([3, -1, 17, 4, 5, 23, 0, -1], np.int32)


def test_every_operation_has_a_test_here(device):
    named = {"paged_attention", "merge_states", "attention_mass", "reposition", "linear",
             "gated_linear", "page_ops.write_slots", "page_ops.gather_slots",
             "page_ops.copy_pages", "page_ops.export_span", "page_ops.import_span",
             "page_ops.empty_pool"}  # fmt: skip
    assert {name for name in OPERATIONS if not name.startswith("test.")} == named


@pytest.mark.parametrize("kind", KINDS)
def test_attention_and_its_mass(device, kind):
    p = problem(1, LLAMA, MIXED, page_size=64, pages_per_seq=4, num_tokens=24, tail_words=1,
                physical=KINDS[kind])  # fmt: skip
    o, lse = attend(p, backend="reference")
    n, got = p.num_tokens, attend(p, backend=None)  # type: ignore[arg-type]
    np.testing.assert_allclose(got[0][:n], o[:n], rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(got[1][:n], lse[:n], rtol=1e-2, atol=1e-2)
    lse = lse.astype(np.float32)
    got, want = (mass(p, lse, segments_of(p), backend=b) for b in (None, "reference"))  # type: ignore[arg-type]
    np.testing.assert_allclose(got.columns, want.columns, rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(got.segments, want.segments, rtol=2e-2, atol=2e-2)


def test_a_cascade(device):
    seqs = [(n, causal(n, 1)) for n in (301, 310, 333)] + [(40, causal(40, 1))]
    p = problem(1, LLAMA, seqs, num_tokens=6, bfloat16=True, soft_cap=3.0)
    cascades.assert_equals_plain_attention(
        *cascades.shared(p, [3, 1], [300, 0]), backend=None, max_query_len=1  # type: ignore[arg-type]
    )  # fmt: skip


def test_merged_states(device):
    rng = np.random.default_rng(0)
    o: Any = rng.standard_normal((3, 5, 4, 16)).astype(np.float32)
    lse: Any = rng.standard_normal((3, 5, 4)).astype(np.float32) * 9
    lse[:, 1], lse[0, 2] = -np.inf, -np.inf
    o[lse == -np.inf] = 0
    got = jax.jit(kernels.merge_states)(o, lse)
    want = kernels.merge_states(o, lse, backend="reference")
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("latent", [False, True], ids=["", "latent"])
def test_writes_gathers_copies_and_spans(device, kind, latent):
    pages = page_ops.random_pages(1, KINDS[kind], latent)
    k, v = page_ops.random_tokens(2, latent)
    got = page_ops.jit_write(pages, k, v, SLOTS)
    want = page_ops.write_slots(pages, k, v, SLOTS, backend="reference")
    page_ops.assert_same_pages(got, want)
    for a, b in zip(
        page_ops.jit_gather(pages, SLOTS),
        page_ops.gather_slots(pages, SLOTS, backend="reference"), strict=True,
    ):  # fmt: skip
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), rtol=1e-6)
    src: Any = np.array([0, 1, 2, 4], np.int32)
    dst: Any = np.array([1, 2, -1, 5], np.int32)
    page_ops.assert_same_pages(
        page_ops.jit_copy(pages, src, dst),
        page_ops.copy_pages(pages, src, dst, backend="reference"),
    )
    span = page_ops.jit_export(pages, SLOTS)
    page_ops.assert_same_pages(span, page_ops.export_span(pages, SLOTS, backend="reference"))
    other = page_ops.random_pages(3, KINDS[kind], latent)
    page_ops.assert_same_pages(
        page_ops.jit_import(other, span, SLOTS),
        page_ops.import_span(other, jax.tree.map(np.asarray, span), SLOTS, backend="reference"),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frame", ["source", "target"])
def test_moves_with_patches_and_shifts(device, kind, frame):
    pages = moves.random_pages(1, KINDS[kind])
    src: Any = np.array([0, 5, 9, 9, 2, 17], np.int32)
    dst: Any = np.array([5, 0, 11, -1, 3, 4], np.int32)
    cos, sin = moves.tables(2, 8)
    options = {"frame": frame} | moves.patches(3, "low rank", False)
    got = moves.jit_reposition(pages, src, dst, cos, sin, **options)
    want = moves.reposition(pages, src, dst, cos, sin, backend="reference", **options)
    moves.assert_close_pages(got, want, dst[dst >= 0])
    got = moves.jit_shift(pages, dst, cos, sin)
    want = moves.rotary_shift(pages, dst, cos, sin, backend="reference")
    moves.assert_close_pages(got, want, dst[dst >= 0])
