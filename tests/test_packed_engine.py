"""An engine over packed pages, as on a TPU: the results of split ones, to the bit."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from kvjax.cache.pages import layout_for
from kvjax.engine import Engine
from kvjax.intake import Intake
from kvjax.pallas_kernels import OPERATIONS, PackedPages
from kvjax.request import SamplingParams
from tests.test_engine_exactness import PARAMS, PROMPTS, bits, cold, serve
from tests.tiny_model import tiny_engine

SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("float32", "bfloat16",
        "float8_e4m3fn")]  # fmt: skip
KINDS = ["int8", *SLOW]
SOME = [0, 1, 3]  # of the prompts: greedy, drawn, penalised


@pytest.fixture(scope="module", autouse=True)
def xla_attention() -> Iterator[None]:
    """One backend for both layouts: the C++ one reads split pages alone.

    jax keeps traces by shapes, whatever backend they chose: none may come in from other tests, nor
    go out to them.
    """
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(OPERATIONS["paged_attention"].preferred, "cpu", ("xla",))
        yield
    engine.cache_clear()
    jax.clear_caches()


@functools.cache
def engine(layout: str, kind: str) -> tuple[Engine, Intake]:
    """Few sequences and tokens in a step, so that there is little to compile."""
    limits: Any = {"max_num_seqs": 2, "max_num_batched_tokens": 16}
    return tiny_engine(layout=layout, kv_cache_dtype=kind, **limits)


def results(served: tuple[Engine, Intake], **between: Any) -> list[Any]:
    prompts, params = [PROMPTS[i] for i in SOME], [PARAMS[i] for i in SOME]
    return list(map(bits, serve(served, prompts, params, **between)))


def test_pages_are_packed_on_a_tpu_and_split_elsewhere():
    assert [layout_for(p) for p in ("tpu", "gpu", "cpu")] == ["packed", "split", "split"]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_pages_give_the_bits_of_split_ones_cold_and_warm(kind):
    packed = cold(engine("packed", kind))
    pages = packed[0].runner.pages
    assert pages is not None
    assert all(isinstance(layer, PackedPages) for layer in pages.layers)
    wanted = results(cold(engine("split", kind)))
    tree = packed[0].scheduler.tree
    assert tree is not None
    before = tree.stats.hit_tokens
    assert results(packed) == wanted
    assert results(packed) == wanted
    assert tree.stats.hit_tokens > before


@pytest.mark.parametrize("kind", KINDS)
def test_forks_copy_packed_pages_when_they_write(kind):
    """The prompt ends inside a page, so each of the four copies that page once."""
    four = SamplingParams(max_tokens=20, n=4, seed=5, ignore_eos=True)
    packed = cold(engine("packed", kind))
    copies: list[int] = []
    dispatch = packed[0].runner.dispatch

    def counting(plan: Any) -> Any:
        copies.append(len(plan.copies))
        return dispatch(plan)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packed[0].runner, "dispatch", counting)
        got = bits(serve(packed, [PROMPTS[0]], [four])[0])
    assert sum(copies) >= 3
    assert got == bits(serve(cold(engine("split", kind)), [PROMPTS[0]], [four])[0])


def test_packed_pages_are_rebuilt_after_they_were_lost():
    packed, wanted = cold(engine("packed", "int8")), results(cold(engine("split", "int8")))

    def lose(engine: Engine, step: int) -> None:
        if step in (3, 9):
            engine._start_over()

    assert results(packed, between=lose) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_the_pool_takes_the_bytes_that_were_counted(kind):
    runner = engine("packed", kind)[0].runner
    held = sum(x.nbytes for x in jax.tree.leaves(runner.pages))
    assert held == runner.num_pages * runner.spec.page_bytes
