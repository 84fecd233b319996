"""A request gives the same bits however it is served: the theorem that everything else rests on."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from kvjax.engine import Engine
from kvjax.intake import Intake
from kvjax.request import RequestOutput, SamplingParams
from kvjax.sequence import Request, Sequence
from tests.models.run_model import logits_in_one_step
from tests.tiny_model import tiny_engine, tiny_model

PREFIX = "the quick brown fox jumps over the lazy dog and "
NARROW = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("bfloat16", "int8")]
every_dtype = pytest.mark.parametrize("dtype", ["float32", *NARROW])

PARAMS = [
    SamplingParams(max_tokens=14, temperature=0, logprobs=3),
    SamplingParams(max_tokens=14, seed=1, logprobs=2),
    SamplingParams(
        max_tokens=14, seed=2, top_p=0.8, presence_penalty=0.5, repetition_penalty=1.3, logprobs=1
    ),
    SamplingParams(max_tokens=14, seed=3, top_k=20, frequency_penalty=1.5, temperature=0.7),
    SamplingParams(
        max_tokens=14, seed=4, min_p=0.05, temperature=1.5, min_tokens=8, bad_words=["e", "th"]
    ),
    SamplingParams(
        max_tokens=14, temperature=0, repetition_penalty=1.4, logit_bias={101: 3.0}, logprobs=0
    ),
    SamplingParams(max_tokens=14, seed=5, allowed_token_ids=list(range(97, 123)), logprobs=0),
    SamplingParams(max_tokens=14, temperature=0, prompt_logprobs=2, logprobs=1),
]
PROMPTS = [
    PREFIX + ending
    for ending in ("runs", "sleeps in the sun", "eats", "", "barks at the fox", "x", "yy", "zzz")
]


@functools.cache
def engine(dtype: str, **settings: Any) -> tuple[Engine, Intake]:
    return tiny_engine(dtype, **settings)


def serve(
    served: tuple[Engine, Intake],
    prompts: list[str],
    params: list[SamplingParams],
    between: Callable[[Engine, int], None] = lambda engine, step: None,
) -> list[RequestOutput]:
    """Runs all together; `between` is called after each step."""
    engine, intake = served
    requests = [intake.request(p, q) for p, q in zip(prompts, params, strict=True)]
    for request in requests:
        engine.add(request)
    drain(engine, between)
    return [intake.output(request) for request in requests]


def drain(engine: Engine, between: Callable[[Engine, int], None]) -> None:
    step = 0
    while engine.has_work:
        engine.step()
        step += 1
        between(engine, step)
        assert step < 5000
    engine.check_integrity()


def bits(output: RequestOutput) -> Any:
    """Everything numeric that a caller sees, compared exactly."""
    assert output.error is None
    completions = [
        (c.text, c.token_ids, c.logprobs, c.cumulative_logprob, c.finish_reason, c.stop_reason)
        for c in output.outputs
    ]
    return completions, output.prompt_logprobs


def cold(served: tuple[Engine, Intake]) -> tuple[Engine, Intake]:
    served[0].reset_prefix_cache()
    return served


@functools.cache
def alone(dtype: str) -> list[Any]:
    """The reference: one at a time, nothing cached, no overlap with planning."""
    return [one_by_one(dtype, *request) for request in zip(PROMPTS, PARAMS, strict=True)]


def one_by_one(dtype: str, prompt: str, params: SamplingParams) -> Any:
    served = cold(engine(dtype))
    with unlike(served[0], "config", overlap=False):
        return bits(serve(served, [prompt], [params])[0])


@contextlib.contextmanager
def unlike(owner: Any, name: str, **changes: Any) -> Iterator[None]:
    """The same compiled programs under other settings."""
    before = getattr(owner, name)
    setattr(owner, name, dataclasses.replace(before, **changes))
    yield
    setattr(owner, name, before)


def assert_as_alone(dtype: str, outputs: list[RequestOutput]) -> None:
    for got, wanted in zip(map(bits, outputs), alone(dtype), strict=True):
        assert got == wanted


def test_the_requests_differ_and_are_about_something():
    texts = [completions[0][0] for completions, _ in alone("float32")]
    assert len(set(texts)) == len(texts)
    assert all(len(completions[0][1]) >= 8 for completions, _ in alone("float32"))


@every_dtype
def test_batched_is_alone(dtype):
    assert_as_alone(dtype, serve(cold(engine(dtype)), PROMPTS, PARAMS))


@every_dtype
def test_what_unwritten_slots_hold_reaches_no_result(dtype):
    served = cold(engine(dtype))

    def poison(pool: Any) -> Any:
        nan = np.float32("nan") if pool.dtype == np.float32 else np.uint16(0x7FC0)
        return jax.numpy.full(pool.shape, nan, pool.dtype)

    served[0].runner.pages = jax.tree.map(poison, served[0].runner.pages)
    assert_as_alone(dtype, serve(served, PROMPTS, PARAMS))


@every_dtype
def test_a_warm_cache_changes_no_bit_and_is_hit(dtype):
    served = cold(engine(dtype))
    tree = served[0].scheduler.tree
    assert tree is not None
    serve(served, PROMPTS, PARAMS)
    before = tree.stats.hit_tokens
    outputs = serve(served, PROMPTS, PARAMS)
    assert_as_alone(dtype, outputs)
    for output in outputs[:-1]:
        assert output.num_cached_tokens == len(output.prompt_token_ids) - 1
    assert outputs[-1].num_cached_tokens == 0  # its prompt is scored, so it is computed
    assert tree.stats.hit_tokens - before >= sum(o.num_cached_tokens for o in outputs)


@every_dtype
def test_preempted_every_few_steps_is_not_preempted(dtype):
    def preempt(engine: Engine, step: int) -> None:
        running = engine.scheduler.running
        if step % 3 == 0 and running:
            engine.scheduler.preempt(running[step % len(running)])
        if step % 7 == 0:
            engine.reset_prefix_cache()

    outputs = serve(cold(engine(dtype)), PROMPTS, PARAMS, preempt)
    assert_as_alone(dtype, outputs)
    assert sum(o.metrics.num_preemptions for o in outputs if o.metrics) > 10


@every_dtype
def test_chunks_of_any_size_are_the_whole(dtype):
    served = cold(engine(dtype))
    for size in (16, 7):
        limits = {"max_num_batched_tokens": size, "max_scored_tokens": size}
        with unlike(served[0].scheduler, "limits", **limits):
            assert_as_alone(dtype, serve(cold(served), PROMPTS, PARAMS))


@pytest.mark.slow
def test_without_prefix_cache_and_in_a_tiny_pool():
    served = engine("float32", num_pages=9, enable_prefix_caching=False)
    outputs = serve(served, PROMPTS, PARAMS)
    assert_as_alone("float32", outputs)
    assert served[0].scheduler.num_preemptions > 0


@every_dtype
def test_n_completions_are_n_texts_each_equal_to_that_branch_alone(dtype):
    served = engine(dtype)
    for params in (PARAMS[1], PARAMS[2]):
        four = serve(cold(served), [PROMPTS[1]], [dataclasses.replace(params, n=4)])[0]
        assert len({c.text for c in four.outputs}) == 4
        assert [c.index for c in four.outputs] == [0, 1, 2, 3]
        for branch, completion in enumerate(four.outputs):
            single = dataclasses.replace(params, branch=branch)
            assert one_by_one(dtype, PROMPTS[1], single)[0][0][:4] == (
                completion.text,
                completion.token_ids,
                completion.logprobs,
                completion.cumulative_logprob,
            )


def test_n_completions_compute_their_prompt_once():
    engine_, intake = cold(engine("float32"))
    before = engine_.runner.real_tokens
    request = intake.request(PROMPTS[1], dataclasses.replace(PARAMS[1], n=4, ignore_eos=True))
    engine_.add(request)
    drain(engine_, lambda engine, step: None)
    computed = engine_.runner.real_tokens - before
    # The last prompt token once per branch (each draws from it), then 13 tokens of each.
    assert computed == len(request.prompt_ids) + 3 + 4 * 13


def open_branch(engine: Engine, intake: Intake, prompt: str) -> Sequence:
    request = intake.request(prompt, SamplingParams(max_tokens=1), samples=False)
    request.sequences[0].keeps_pages = True
    engine.add(request)
    drain(engine, lambda engine, step: None)
    return request.sequences[0]


@every_dtype
def test_forked_branches_are_separate_requests_with_the_same_tokens(dtype):
    engine_, intake = cold(engine(dtype))
    root = open_branch(engine_, intake, PREFIX)
    requests: list[Request] = []
    for i, hint in enumerate(["runs", "sleeps in the sun", "eats", ""]):
        child = Sequence(root.request, list(root.tokens), keeps_pages=True)
        engine_.park(child, root)
        child.tokens += intake.tokenizer.encode(hint)
        params = dataclasses.replace(PARAMS[i], branch=i)
        requests.append(intake.from_ids(list(child.tokens), params, sequence=child))
    for request in requests:
        engine_.add(request)
    drain(engine_, lambda engine, step: None)
    forked = [intake.output(request) for request in requests]
    for i, output in enumerate(forked):
        assert output.num_cached_tokens >= len(PREFIX) - 1
        params = dataclasses.replace(PARAMS[i], branch=i)
        assert one_by_one(dtype, PROMPTS[i], params) == bits(output)
    for request in requests:
        engine_.discard(request.sequences[0])
    engine_.discard(root)
    engine_.check_integrity()
    engine_.reset_prefix_cache()
    assert engine_.scheduler.pool.num_free == engine_.scheduler.pool.num_pages


def test_logprobs_are_those_of_a_float64_softmax_over_a_direct_forward():
    params = SamplingParams(max_tokens=6, seed=9, logprobs=4, prompt_logprobs=3)
    output = serve(cold(engine("float32")), [PROMPTS[1]], [params])[0]
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    logits = logits_in_one_step(tiny_model("float32"), [np.asarray(ids)])[0].astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    exact = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    assert output.prompt_logprobs is not None
    assert output.outputs[0].logprobs is not None
    assert output.prompt_logprobs[0] is None
    entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    counts = [3] * (len(output.prompt_token_ids) - 1) + [4] * 6
    total = 0.0
    for place, (entry, count) in enumerate(zip(entries, counts, strict=True), start=1):
        row, token = exact[place - 1], ids[place]
        assert entry is not None
        best = np.argsort(-row)[:count].tolist()
        assert set(entry) == {*best, token}
        for token_id, logprob in entry.items():
            assert abs(logprob.logprob - row[token_id]) < 1e-4
            assert logprob.rank == 1 + np.sum(row > row[token_id])
            assert logprob.decoded_token
        if place >= len(output.prompt_token_ids):
            total += entry[token].logprob
    assert output.outputs[0].cumulative_logprob == pytest.approx(total)
