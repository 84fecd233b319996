"""Decode steps whose sequences share a prefix: read once where that pays, with the same tokens."""

import functools
from typing import Any

import jax
import pytest

from kvjax.cache.pages import KVGroup, KVSpec
from kvjax.engine import Engine
from kvjax.intake import Intake
from kvjax.ladder import ladder
from kvjax.pallas_kernels import OPERATIONS
from kvjax.prefix_groups import CascadeRule
from kvjax.request import SamplingParams
from kvjax.runner import _BESIDE
from kvjax.step import Bucket, StepLayout
from kvjax.step_plan import Limits
from tests.test_engine_exactness import cold, serve
from tests.tiny_model import tiny_engine, tiny_model

LONG = "the quick brown fox jumps over the lazy dog and runs through the wood to the old mill, "
PROMPTS = [LONG + ending for ending in ("once", "twice", "three times", "for ever")]
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(autouse=True)
def xla_attention(monkeypatch):
    """The backend of every platform; the one for CPUs shares prefixes by itself."""
    monkeypatch.setitem(OPERATIONS["paged_attention"].preferred, "cpu", ("xla",))


@functools.cache
def engine(cascade: bool, layout: str = "split", max_num_seqs: int = 4) -> tuple[Engine, Intake]:
    return tiny_engine(
        num_pages=96, max_model_len=160, layout=layout, cascade=cascade, max_num_seqs=max_num_seqs
    )


def tokens(served: tuple[Engine, Intake], prompts: list[str], params: SamplingParams) -> Any:
    """Served twice: the second time all hit what the first one left."""
    serve(served, prompts[:1], [params])
    outputs = serve(served, prompts, [params] * len(prompts))
    return [[c.token_ids for c in output.outputs] for output in outputs]


@pytest.mark.parametrize("layout", ["split", "packed"])
def test_a_shared_prefix_is_read_once_and_gives_the_same_tokens(layout):
    without = tokens(cold(engine(False)), PROMPTS, GREEDY)
    served = cold(engine(True, layout))
    before = served[0].runner.cascade_steps
    assert tokens(served, PROMPTS, GREEDY) == without
    assert served[0].runner.cascade_steps - before >= 10


def test_nothing_is_compiled_after_warm_up_whoever_shares():
    served = tiny_engine(
        num_pages=96, max_model_len=160, cascade=True, max_num_seqs=2, max_num_batched_tokens=16
    )
    runner = served[0].runner
    runner.warm_up()
    assert runner.is_warm
    before, compiled = runner.cascade_steps, runner.compiles
    tokens(served, PROMPTS, GREEDY)
    tokens(served, ["one", "other", "third"], GREEDY)
    assert runner.cascade_steps > before
    assert runner.compiles == compiled == len(runner.buckets) + len(_BESIDE)


def test_the_rule_decides_batch_by_batch():
    """Different texts share nothing; a short prefix does not pay for its partial states."""
    served = cold(engine(True))
    runner = served[0].runner
    before = runner.cascade_steps
    apart = [f"{i} stories of the sea" for i in range(4)]
    tokens(served, apart, GREEDY)
    assert runner.cascade_steps == before
    tokens(served, PROMPTS, GREEDY)
    assert runner.cascade_steps > before


def test_the_forks_of_one_prompt_are_a_group():
    params = SamplingParams(max_tokens=12, n=16, seed=3, ignore_eos=True)
    served = cold(engine(True, max_num_seqs=16))
    before = served[0].runner.cascade_steps
    forks = tokens(served, [LONG], params)[0]
    assert served[0].runner.cascade_steps - before >= 8
    for branch in (0, 7, 15):
        alone = SamplingParams(max_tokens=12, branch=branch, seed=3, ignore_eos=True)
        assert tokens(engine(False), [LONG], alone)[0] == [forks[branch]]


def test_groups_of_two_prompts_and_a_loner_in_one_step_keep_their_tokens_apart():
    other = LONG.replace("fox", "cat")
    prompts = [PROMPTS[0], other + "once", PROMPTS[1], "a loner", other + "twice", PROMPTS[2]]
    for served in (engine(True), engine(False)):
        serve(cold(served), [LONG, other], [GREEDY, GREEDY])
    before = engine(True)[0].runner.cascade_steps
    got = tokens(engine(True), prompts, GREEDY)
    assert engine(True)[0].runner.cascade_steps > before
    assert got == tokens(engine(False), prompts, GREEDY)


def cascades(**settings: Any) -> list[str]:
    return [str(b) for b in tiny_engine(**settings)[0].runner.buckets if b.cascade]


def test_an_accelerator_has_programs_for_cascades_unless_bits_are_to_be_steady(monkeypatch):
    for steady in (True, False):
        tiny_model("float32", steady)  # before the platform is another one
    assert cascades(deterministic=False) == []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert cascades(deterministic=False) == ["cascade2", "cascade4"]
    assert cascades(deterministic=True) == []


def test_programs_for_cascades_are_one_per_decode_program_of_several_sequences():
    limits = Limits(8, 32, 128, 32)
    plain, both = ladder(limits), ladder(limits, cascade=True)
    assert both[: len(plain)] == plain
    assert [str(b) for b in both[len(plain) :]] == ["cascade2", "cascade4", "cascade8"]


RULE = CascadeRule(page_size=16, token_bytes=4096, state_bytes=16512)


def pages(first: int, own: int, shared: int = 100) -> list[int]:
    return [*range(first, first + shared), *range(own, own + 3)]


def test_sharers_are_put_side_by_side_wherever_they_stood():
    tables = [pages(0, 900), pages(500, 910), pages(0, 920), [7000], pages(500, 930), pages(0, 940)]
    found = RULE.groups(tables, [16 * len(t) for t in tables])
    assert found is not None
    assert found.order == (0, 2, 5, 1, 4, 3)
    assert found.group_starts == (0, 3, 5, 6)
    assert found.prefix_lens == (1600, 1600, 0)
    starts, prefixes = found.padded(8)
    assert starts.tolist() == [0, 3, 5, 6, 7, 8, 8, 8, 8]
    assert prefixes.tolist() == [1600, 1600, 0, 0, 0, 0, 0, 0]


def test_what_does_not_pay_is_no_group():
    assert RULE.groups([[1], [2], [3]], [16, 16, 16]) is None
    short = [[1, 2], [1, 3]]
    assert RULE.groups(short, [32, 32]) is None


def test_pages_of_equal_tokens_that_were_computed_apart_are_not_shared():
    """Page 50 is common, but behind pages that are not."""
    tables = [[1, 2, 50, *range(100, 200)], [1, 3, 50, *range(100, 200)]]
    found = CascadeRule(16, 4096, 1).groups(tables, [1600, 1600])
    assert found is None or found.prefix_lens == (16,)


def test_only_layers_that_see_everything_are_grouped():
    """Gemma's windows leave little to share; its full layers read the prefix once."""
    kinds: Any = {"num_kv_heads": 2, "k_width": 64, "v_width": 64, "dtype": "float32"}
    full = KVGroup(kind="full", layers=(1,), **kinds)
    sliding = KVGroup(kind="sliding", layers=(0,), window=32, **kinds)
    spec = KVSpec(groups=(sliding, full), page_size=16)
    bucket = Bucket(4, 4, 4, decode=True, cascade=True)
    local, wide = StepLayout(bucket, spec, 8, {}).padding().views
    assert local.group_starts is None
    assert wide.group_starts is not None
    assert wide.prefix_lens is not None
    assert wide.prefix_lens.shape == (4,)
