"""After warm-up an engine that reuses chunks compiles nothing, and answers as it did before."""

import dataclasses
import functools
import itertools
import random

import pytest

from kvjax import LLM, Chunk, SamplingParams
from kvjax.reuse import parse
from kvjax.reuse.attended import AttendedShape
from kvjax.reuse.forward import StagedShape, rung, shape_of
from kvjax.reuse.padding import PIECE_SIZES
from kvjax.reuse.plan import Spans, Stage, StagedPlan, TopK
from kvjax.reuse.repair import repair_shape
from kvjax.reuse.restore import CaptureShape, RestoreShape
from kvjax.reuse.strategy import ModelFacts
from kvjax.reuse.warming import reuse_programs, smallest_holding
from tests.reuse.prompts import answer, distance, fresh_llm, prompts
from tests.test_engine import Compilations
from tests.tiny_model import tiny

BLEND = "cacheblend:ratio=0.2,check_layer=0"  # the model has two layers
FACTS = ModelFacts(num_layers=4, hidden_size=64, kv_token_bytes=1024, hidden_token_bytes=512)
STAGED = ("cacheblend", "cacheblend:gradual=true", "fusionrag", "kvshare", "cacheclip",
          "cachecraft", "cachecraft:ratio=0.3", "relaycaching",
          "relaycaching:start=1,detect=2")  # fmt: skip


def random_prompts(seed: int, count: int) -> list:
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        parts: list[str | Chunk] = ["".join(draw.choices("abcdefgh ", k=draw.randint(1, 20)))]
        for _ in range(draw.randint(1, 4)):
            parts.append(Chunk("".join(draw.choices("ijklmnop ", k=draw.randint(1, 20)))))
            if draw.random() < 0.3:
                parts.append(" and ")
        made.append([*parts, "question?"] if draw.random() < 0.8 else parts)
    return made


@functools.cache
def warm_llm(spec: str) -> LLM:
    llm = tiny(LLM, fresh=True, num_pages=128, max_model_len=130, reuse=spec)
    llm.warm_up()
    return llm


@pytest.mark.parametrize(
    "spec",
    [
        BLEND,
        "kamera:rank=4,most=99",
        "cachecraft",
        "hcache",
        pytest.param("kvshare:repair=2,check_layer=0", marks=pytest.mark.slow),
    ],
)
def test_after_warm_up_prompts_with_chunks_compile_nothing(spec):
    llm = warm_llm(spec)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, reuse=spec)
    assert llm.engine.runner.is_warm
    llm.generate(random_prompts(0, 4), params)  # numpy conversions and the like of the first use
    if spec.startswith("kamera"):
        llm.condition(["sys", Chunk("abcd"), Chunk("efgh")], strategy=spec)
        llm.reset_prefix_cache()  # which has the conditioned prompt, exactly
    compiled, events = llm.engine.runner.compiles, Compilations()
    made = [["sys", Chunk("abcd"), Chunk("efgh"), "?"], *random_prompts(1, 25)]
    with events:
        outs = llm.generate(made, params)
    assert all(out.error is None for out in outs)
    assert (llm.engine.runner.compiles, events.names) == (compiled, [])
    report = outs[0].reuse
    if spec in ("cachecraft", "hcache"):  # they keep chunks where prompts had them
        again = llm.generate(made[1:2], params)[0].reuse
        assert again.exact > 0
    else:
        assert (report.patched if spec.startswith("kamera") else report.shifted) > 0


def test_answers_of_a_warm_engine_are_those_of_a_cold_one():
    cold, warm = fresh_llm(), warm_llm(BLEND)
    warm.engine.chunks.store.clear()
    warm.reset_prefix_cache()
    for name in ("order", "no question"):
        prompt = prompts()[name]
        one, other = (answer(llm, prompt, BLEND) for llm in (cold, warm))
        assert distance(one, other) <= 1e-5
        assert (one.reuse.fates == other.reuse.fates).all()


@pytest.mark.parametrize("spec", STAGED)
def test_some_warmed_program_holds_any_staged_prompt(spec):
    strategy, limit = parse(spec), 1024
    shapes = reuse_programs(strategy, FACTS, limit)
    staged = [shape for shape in shapes if isinstance(shape, StagedShape)]
    assert staged
    assert any(shape.hidden_size for shape in staged) == ("start" in spec)
    sizes = (1, 129, 400, limit - 2)
    for shape in staged:
        for size, rows, chunks in itertools.product(sizes, sizes, (1, 16)):
            stages = tuple(
                dataclasses.replace(stage, rows=rung(min(rows, size))) for stage in shape.stages
            )
            wanted = dataclasses.replace(shape, candidates=rung(size), chunks=chunks, stages=stages)
            found = smallest_holding(shapes, wanted)
            assert found is not None
            assert found.candidates >= wanted.candidates
            assert all(a.rows >= b.rows for a, b in zip(found.stages, stages, strict=True))


def test_of_the_programs_that_hold_a_prompt_the_one_with_least_work_is_taken():
    shapes = reuse_programs(parse("cacheblend:ratio=0.2"), FACTS, 1024)
    rows = Spans(((0, 200),))
    plan = StagedPlan((Stage(0, 2, rows), Stage(2, 4, TopK("value_deviation", 36))))
    found = smallest_holding(shapes, shape_of(plan, 200, 20, 3))
    assert found is not None
    assert (found.candidates, found.stages[0].rows) == (256, 256)
    assert found.stages[1].rows < 128


def test_a_program_of_another_plan_never_holds_a_prompt():
    shapes = reuse_programs(parse("cacheblend"), FACTS, 1024)
    plan = StagedPlan((Stage(0, 1, Spans(((0, 9),))), Stage(1, 4, TopK("value_deviation", 2))))
    assert smallest_holding(shapes, shape_of(plan, 9, 1, 1)) is None


def test_exact_reuse_needs_no_programs_and_known_rows_no_staged_ones():
    assert reuse_programs(parse(None), FACTS, 1024) == ()
    for spec in ("epic", "naive", "cachetune", "oracle", "random"):
        shapes = reuse_programs(parse(spec), FACTS, 1024)
        assert shapes
        assert not any(isinstance(shape, StagedShape) for shape in shapes)
    ranks = {getattr(shape, "patch", None) for shape in reuse_programs(parse("kamera"), FACTS, 99)}
    assert ranks == {None, (16,)}


def test_what_a_strategy_keeps_and_repairs_is_warmed_up_with_it():
    craft = reuse_programs(parse("cachecraft"), FACTS, 1024)
    assert {s.rows for s in craft if isinstance(s, AttendedShape)} == set(PIECE_SIZES)
    kept = reuse_programs(parse("hcache"), FACTS, 1024)
    assert {type(shape) for shape in kept} == {CaptureShape, RestoreShape}
    repairs = repair_shape(rung(1000), 3, 1, 4)
    assert smallest_holding(reuse_programs(parse("kvshare:repair=3"), FACTS, 1024), repairs)
    assert not smallest_holding(reuse_programs(parse("kvshare"), FACTS, 1024), repairs)
