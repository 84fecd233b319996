"""A device step that really raises: only who caused it fails, the others give the same tokens."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.decode import LOGIT_STAGES, register_stage
from kvjax.engine import Engine
from kvjax.errors import StepFailed
from kvjax.intake import Intake
from kvjax.request import RequestOutput, SamplingParams
from kvjax.sequence import Request, Sequence
from tests.tiny_model import tiny_engine

PROMPTS = ["one fox", "two dogs run", "three", "four lazy cats", "five hens"]


class Sabotage:
    """A logit stage from outside that raises on the host, in the middle of the device's step."""

    name = "sabotage"
    arguments = {"sabotage": 0.0}  # noqa: RUF012 - the protocol's shape

    def __init__(self) -> None:
        self.transient = 0  # steps that raise for no fault of theirs
        self.raised = 0

    def wanted(self, rows: Any) -> Any:
        return rows.extra["sabotage"] >= 0  # always: it may raise for anybody

    def apply(self, logits: Any, state: Any, rows: Any) -> Any:
        def check(values: Any, flags: Any, positions: Any) -> Any:
            wicked = bool(np.any((np.asarray(flags) > 0) & (np.asarray(positions) >= flags)))
            if wicked or self.transient:
                self.transient = max(0, self.transient - 1)
                self.raised += 1
                raise ValueError("sabotage")
            return np.asarray(values)

        shape = jax.ShapeDtypeStruct(logits.shape, jnp.float32)
        return jax.pure_callback(check, shape, logits, rows.extra["sabotage"], rows.positions)


@pytest.fixture(scope="module")
def sabotage() -> Iterator[Sabotage]:
    stage = Sabotage()
    register_stage(stage)
    yield stage
    LOGIT_STAGES.remove(stage)


@pytest.fixture(scope="module")
def served(sabotage: Sabotage) -> tuple[Engine, Intake]:
    return tiny_engine(max_num_batched_tokens=16)


@pytest.fixture(scope="module")
def expected(served: tuple[Engine, Intake]) -> list[tuple[int, ...]]:
    return [o.outputs[0].token_ids for o in serve(served, [request(served, p) for p in PROMPTS])]


def request(served: tuple[Engine, Intake], prompt: str, **extra: Any) -> Request:
    params = SamplingParams(
        max_tokens=8, seed=7, ignore_eos=True, presence_penalty=0.3, extra_args=extra or None
    )
    return served[1].request(prompt, params)


def serve(served: tuple[Engine, Intake], requests: list[Request]) -> list[RequestOutput]:
    engine, intake = served
    for each in requests:
        engine.add(each)
    for _ in range(1000):
        if not engine.has_work:
            break
        engine.step()
    assert not engine.has_work
    engine.check_integrity()
    return [intake.output(each) for each in requests]


def nothing_leaks(engine: Engine) -> None:
    engine.reset_prefix_cache()
    pool = engine.scheduler.pool
    held = {page for sequence in engine._parked for page in sequence.page_ids}
    assert pool.num_free == pool.num_pages - len(held)
    assert engine._suspects.none


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_only_the_culprit_fails_and_the_others_do_not_notice(
    served, expected, sabotage, place, overlap
):
    engine = served[0]
    object.__setattr__(engine.config, "overlap", overlap)
    requests = [request(served, prompt) for prompt in PROMPTS]
    at = len(PROMPTS[place]) + 3.0  # raises when it is to draw its fourth token
    requests[place] = request(served, PROMPTS[place], sabotage=at)
    outputs = serve(served, requests)
    for i, output in enumerate(outputs):
        if i == place:
            assert isinstance(output.error, StepFailed)
            assert "sabotage" in str(output.error.__cause__)
            assert output.outputs[0].finish_reason == "error"
            assert output.outputs[0].token_ids == expected[i][: len(output.outputs[0].token_ids)]
        else:
            assert output.error is None
            assert output.outputs[0].token_ids == expected[i]
    nothing_leaks(engine)


@pytest.mark.parametrize("times", [1, 2])
def test_a_failure_that_passes_fails_nobody_when_several_are_in_flight(
    served, expected, sabotage, times
):
    requests = [request(served, prompt) for prompt in PROMPTS[:4]]
    for each in requests:
        served[0].add(each)
    for _ in range(3):
        served[0].step()
    for _ in range(times):
        sabotage.transient, before = 1, sabotage.raised
        while sabotage.raised == before:
            served[0].step()
    outputs = serve(served, [])
    assert outputs == []
    outputs = [served[1].output(each) for each in requests]
    assert [o.outputs[0].token_ids for o in outputs] == expected[:4]
    assert [o.error for o in outputs] == [None] * 4
    nothing_leaks(served[0])


def test_parked_branches_are_usable_after_the_pool_was_lost(served, expected, sabotage):
    engine, intake = served
    opened = intake.request(PROMPTS[3][:6], SamplingParams(max_tokens=1), samples=False)
    opened.sequences[0].keeps_pages = True
    serve(served, [opened])
    root = opened.sequences[0]
    child = Sequence(opened, list(root.tokens), keeps_pages=True)
    engine.park(child, root)
    bad = request(served, PROMPTS[0], sabotage=1.0)
    assert isinstance(serve(served, [bad])[0].error, StepFailed)
    assert (root.num_computed, root.page_ids) == (0, [])
    child.tokens += intake.tokenizer.encode(PROMPTS[3][6:])
    params = SamplingParams(max_tokens=8, seed=7, ignore_eos=True, presence_penalty=0.3)
    output = serve(served, [intake.from_ids(list(child.tokens), params, sequence=child)])[0]
    assert output.outputs[0].token_ids == expected[3]
    engine.discard(child)
    engine.discard(root)
    nothing_leaks(engine)


def test_a_whole_request_fails_if_one_of_its_branches_does(served, expected, sabotage):
    params = SamplingParams(max_tokens=8, n=3, seed=7, extra_args={"sabotage": 11.0})
    bad = served[1].request(PROMPTS[0], params)
    output, other = serve(served, [bad, request(served, PROMPTS[1])])
    assert isinstance(output.error, StepFailed)
    assert all(c.finish_reason in ("error", "stop") for c in output.outputs)
    assert other.outputs[0].token_ids == expected[1]
    nothing_leaks(served[0])


def test_an_interrupt_in_a_step_leaves_the_engine_serving(served, expected, monkeypatch):
    engine = served[0]
    requests = [request(served, prompt) for prompt in PROMPTS[:3]]
    for each in requests:
        engine.add(each)
    engine.step()

    def interrupt(plan: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine.runner, "dispatch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    serve(served, [])
    outputs = [served[1].output(each) for each in requests]
    assert [o.outputs[0].token_ids for o in outputs] == expected[:3]
    nothing_leaks(engine)


def test_logits_that_are_not_finite_fail_their_request_alone(served, expected):
    engine = served[0]
    requests = [request(served, prompt) for prompt in PROMPTS[:3]]
    commit = engine._commit

    def unhealthy(step: Any) -> Any:
        healthy = np.asarray([o.sequence.request is not requests[1] for o in step.owners])
        return commit(dataclasses.replace(step, out=dataclasses.replace(step.out, healthy=healthy)))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine, "_commit", unhealthy)
        outputs = serve(served, requests)
    assert isinstance(outputs[1].error, StepFailed)
    assert outputs[0].outputs[0].token_ids == expected[0]
    assert outputs[2].outputs[0].token_ids == expected[2]
    nothing_leaks(engine)
