"""A device without memory: steps become smaller, nobody fails who can run, no token changes."""

import dataclasses
import logging
from collections.abc import Iterator

import pytest

from kvjax import runner as runner_module
from kvjax.engine import Engine
from kvjax.errors import StepFailed
from kvjax.intake import Intake
from kvjax.request import SamplingParams
from kvjax.runner import ladder
from kvjax.sequence import Request
from kvjax.shrink import smaller
from kvjax.step_plan import Limits, Portion, StepPlan
from tests.small_device import Memory
from tests.tiny_model import shared_engine, tiny_engine

PROMPTS = ["one fox and nine hens", "two dogs run", "three", "four lazy cats in a den"]
LIMITS = Limits(4, 64, 256, 64)


@pytest.fixture(scope="module")
def memory() -> Iterator[Memory]:
    found = Memory()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runner_module, "step", found.step)
        yield found


@pytest.fixture(scope="module")
def served(memory: Memory) -> tuple[Engine, Intake]:
    return tiny_engine()


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    return tokens(serve(shared_engine()))


def serve(served: tuple[Engine, Intake]) -> list[Request]:
    engine, intake = served
    params = SamplingParams(max_tokens=6, seed=7, ignore_eos=True)
    requests = [intake.request(prompt, params) for prompt in PROMPTS]
    for each in requests:
        engine.add(each)
    for _ in range(500):
        if not engine.has_work:
            break
        engine.step()
    assert not engine.has_work
    engine.check_integrity()
    return requests


def tokens(requests: list[Request]) -> list[tuple[int, ...]]:
    return [request.sequences[0].output_ids for request in requests]


def test_steps_become_smaller_and_everybody_gets_the_same_tokens(expected, memory, served, caplog):
    memory.tokens, memory.seqs = 16, 2
    with caplog.at_level(logging.WARNING, "kvjax"):
        requests = serve(served)
    assert [request.error for request in requests] == [None] * len(PROMPTS)
    assert tokens(requests) == expected
    engine, limits = served[0], served[0].scheduler.limits
    assert (limits.max_num_batched_tokens, limits.max_num_seqs) == (16, 2)
    said = [r.getMessage() for r in caplog.records if "ran out of memory" in r.getMessage()]
    assert len(said) == engine.num_shrinks == 2
    assert "at most 16 tokens" in said[0]
    assert tokens(serve(served)) == expected
    assert engine.num_shrinks == 2, "what was too large once is not tried again"


def test_who_needs_more_than_the_smallest_step_fails_and_the_cause_is_named(
    expected, memory, served
):
    engine, _ = served
    memory.seqs = 0  # no step that is compiled from now on can decode
    for bucket in [key for key in engine.runner._programs if str(key).startswith("decode")]:
        del engine.runner._programs[bucket]
    requests = serve(served)
    assert [type(request.error) for request in requests] == [StepFailed] * len(PROMPTS)
    assert "RESOURCE_EXHAUSTED" in str(requests[0].error)
    for got, whole in zip(tokens(requests), expected, strict=True):
        assert got == whole[: len(got)]
    assert engine.scheduler.limits.max_num_seqs == 1


def plan(*sizes: int, scores: bool = False) -> StepPlan:
    portions = tuple(Portion(None, 0, size, True, scores) for size in sizes)  # type: ignore[arg-type]
    return StepPlan(portions, (), ())


@pytest.mark.parametrize(
    ("failed", "tokens", "seqs"),
    [
        (plan(60), 32, 4),
        (plan(33, 1), 32, 4),
        (plan(20, 1, 1), 16, 4),
        (plan(1, 1, 1), 64, 2),
        (plan(1, 1), 64, 1),
    ],
)
def test_the_next_smaller_program_is_what_is_left(failed, tokens, seqs):
    left = smaller(LIMITS, ladder(LIMITS), failed)
    assert left == dataclasses.replace(LIMITS, max_num_batched_tokens=tokens, max_num_seqs=seqs)


@pytest.mark.parametrize("failed", [plan(1), plan(9), plan(40, scores=True)])
def test_the_smallest_and_those_of_one_size_have_no_smaller_one(failed):
    assert smaller(LIMITS, ladder(LIMITS), failed) is None


def test_limits_never_grow_back():
    low = dataclasses.replace(LIMITS, max_num_batched_tokens=16, max_num_seqs=1)
    assert smaller(low, ladder(LIMITS), plan(40)) == low
