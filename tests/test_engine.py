"""What the engine does with requests: where they end, who goes first, what it refuses."""

import dataclasses
import logging
import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import pytest

from kvjax.engine import Engine
from kvjax.errors import KVJaxError, PromptTooLong
from kvjax.intake import Intake
from kvjax.request import RequestOutput, SamplingParams
from kvjax.sequence import Request, Status
from tests.fake_device import make_engine
from tests.tiny_model import END, shared_engine, tiny_engine

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture
def served() -> tuple[Engine, Intake]:
    engine, intake = shared_engine()
    assert not engine.has_work
    engine.reset_prefix_cache()
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages
    return engine, intake


def drain(engine: Engine, seen: Callable[[Request], None] = lambda request: None) -> None:
    for _ in range(5000):
        if not engine.has_work:
            break
        for request in engine.step():
            seen(request)
    assert not engine.has_work
    engine.check_integrity()


def serve(served: tuple[Engine, Intake], *pairs: tuple[Any, SamplingParams]) -> list[RequestOutput]:
    engine, intake = served
    requests = [intake.request(prompt, params) for prompt, params in pairs]
    for request in requests:
        engine.add(request)
    drain(engine)
    return [intake.output(request) for request in requests]


def one(served: tuple[Engine, Intake], prompt: Any, params: SamplingParams) -> RequestOutput:
    return serve(served, (prompt, params))[0]


# ---- where a sequence ends --------------------------------------------------------------------


def test_a_stop_string_ends_the_text_and_the_extra_token_is_discarded(served):
    whole = one(served, "abc", GREEDY).outputs[0]
    stop = whole.text[3:6]
    for keeps in (False, True):
        params = dataclasses.replace(GREEDY, stop=[stop], include_stop_str_in_output=keeps)
        output = one(served, "abc", params).outputs[0]
        end = whole.text.index(stop)
        assert output.text == whole.text[: end + len(stop) if keeps else end]
        assert output.token_ids == whole.token_ids[: len(output.token_ids)]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    drain(served[0])


def test_a_stop_token_ends_the_sequence_and_min_tokens_bans_it_before(served):
    whole = one(served, "abc", GREEDY).outputs[0]
    token = whole.token_ids[4]
    first = whole.token_ids.index(token)
    output = one(
        served,
        "abc",
        dataclasses.replace(GREEDY, stop_token_ids=[token], skip_special_tokens=False),
    ).outputs[0]
    assert output.token_ids == whole.token_ids[: first + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", token)
    later = dataclasses.replace(GREEDY, stop_token_ids=[token], min_tokens=9)
    output = one(served, "abc", later).outputs[0]
    assert len(output.token_ids) >= 9
    assert token not in output.token_ids[:9]


def test_the_models_end_token_ends_it_unless_ignored(served):
    bias = {END: 100.0}
    ends = SamplingParams(max_tokens=5, temperature=0, logit_bias=bias)
    output = one(served, "abc", ends).outputs[0]
    assert (output.token_ids, output.finish_reason, output.stop_reason) == ((END,), "stop", None)
    assert output.text == ""
    output = one(served, "abc", dataclasses.replace(ends, ignore_eos=True)).outputs[0]
    assert (output.token_ids, output.finish_reason) == ((END,) * 5, "length")
    output = one(served, "abc", dataclasses.replace(ends, min_tokens=3)).outputs[0]
    assert len(output.token_ids) == 4
    assert END not in output.token_ids[:3]


def test_the_context_length_ends_it(served):
    limit = served[0].limits.max_model_len
    for prompt_len in (limit - 1, limit - 20):
        output = one(served, [5] * prompt_len, dataclasses.replace(GREEDY, max_tokens=None))
        assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == limit
        assert output.outputs[0].finish_reason == "length"


def test_snapshots_are_prefixes_of_the_final_text(served):
    engine, intake = served
    whole = one(served, "abc", GREEDY).outputs[0].text
    params = dataclasses.replace(GREEDY, stop=[whole[8:12]], n=2)
    request = intake.request("abc", params)
    snapshots: list[RequestOutput] = []
    engine.add(request)
    drain(engine, lambda r: snapshots.append(intake.output(r, streaming=not r.finished)))
    final = intake.output(request)
    assert len(snapshots) > 5
    for branch in range(2):
        for snapshot in snapshots:
            done, part = final.outputs[branch], snapshot.outputs[branch]
            assert done.text.startswith(part.text)
            assert part.token_ids == done.token_ids[: len(part.token_ids)]
    assert [c.text for c in snapshots[-1].outputs] == [c.text for c in final.outputs]


def test_a_warm_cache_leaves_prompt_logprobs_complete(served):
    params = dataclasses.replace(GREEDY, prompt_logprobs=1, max_tokens=2)
    prompt = "a prompt of some fifty letters that is in the cache"
    cold = one(served, prompt, params)
    warm = one(served, prompt, params)
    assert warm.prompt_logprobs == cold.prompt_logprobs
    assert warm.prompt_logprobs is not None
    assert warm.prompt_logprobs[0] is None
    assert all(entry is not None for entry in warm.prompt_logprobs[1:])


# ---- compilation --------------------------------------------------------------------------------


def random_requests(intake: Intake, count: int) -> list[Request]:
    rng = random.Random(0)
    requests = []
    for i in range(count):
        temperature = rng.choice([0, 0.5, 1.0, 2.0])
        params = SamplingParams(
            n=rng.choice([1, 1, 1, 2, 4]),
            max_tokens=rng.randint(1, 12),
            temperature=temperature,
            top_p=rng.choice([1.0, 0.5]),
            top_k=rng.choice([0, 5]),
            min_p=rng.choice([0.0, 0.1]),
            presence_penalty=rng.choice([0.0, 1.0]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            logprobs=rng.choice([None, 0, 5]),
            prompt_logprobs=rng.choice([None, None, None, 2]),
            logit_bias={7: 2.0} if rng.random() < 0.2 else None,
            bad_words=["ab"] if rng.random() < 0.2 else None,
            stop=["e"] if rng.random() < 0.3 else None,
            min_tokens=1,
            priority=rng.choice([0, 0, 1]),
            cache_salt=rng.choice([None, "a"]),
            seed=i,
        )
        prompt = [rng.randint(1, 3)] * rng.randint(1, 40) + rng.choices(range(1, 256), k=9)
        requests.append(intake.from_ids(prompt, params))
    return requests


def test_after_warm_up_two_hundred_random_requests_compile_nothing(served):
    engine, intake = served
    engine.runner.warm_up()
    assert engine.runner.is_warm
    for request in random_requests(intake, 12):  # numpy conversions and the like of the first use
        engine.add(request)
    drain(engine)
    compiled, events = engine.runner.compiles, Compilations()
    requests = random_requests(intake, 200)
    pending = list(requests)
    with events:
        while pending or engine.has_work:
            for request in pending[:3]:
                engine.add(request)
            del pending[:3]
            engine.step()
    assert all(request.finished and request.error is None for request in requests)
    assert (engine.runner.compiles, events.names) == (compiled, [])
    engine.check_integrity()


class Compilations(logging.Handler):
    """Names of what jax compiles meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "Compiling" in record.getMessage():
            self.names.append(record.getMessage())

    def __enter__(self) -> None:
        self.logger = logging.getLogger("jax._src.interpreters.pxla")
        self.propagates, self.logger.propagate = self.logger.propagate, False
        self.logger.addHandler(self)
        jax.config.update("jax_log_compiles", True)

    def __exit__(self, *exc: object) -> None:
        jax.config.update("jax_log_compiles", False)
        self.logger.propagate = self.propagates
        self.logger.removeHandler(self)


def test_the_compilation_counter_sees_a_compilation():
    events = Compilations()
    with events:
        jax.jit(lambda x: x * 3 + 1)(jax.numpy.ones(3))
    assert events.names


# ---- who goes first -----------------------------------------------------------------------------


def test_an_urgent_request_takes_the_seat_of_a_less_urgent_one(served):
    engine, intake = served
    long = dataclasses.replace(GREEDY, max_tokens=60, priority=1)
    slow = [intake.request(prompt, long) for prompt in ("aa", "bb", "cc", "dd", "ee")]
    for request in slow:
        engine.add(request)
    for _ in range(5):
        engine.step()
    assert not engine.scheduler._seats
    urgent = intake.request("zz", dataclasses.replace(GREEDY, max_tokens=4, priority=0))
    engine.add(urgent)
    steps = 0
    while not urgent.finished:
        engine.step()
        steps += 1
    assert steps <= 9
    assert not any(request.finished for request in slow)
    drain(engine)
    assert sum(request.metrics.num_preemptions for request in slow) == 1
    alone = one(served, "dd", long)
    assert intake.output(slow[3]).outputs[0].token_ids == alone.outputs[0].token_ids


def test_requests_of_one_priority_are_served_in_order_and_none_starves(served):
    engine, intake = served
    requests = [
        intake.from_ids([i + 1] * (5 + 11 * (i % 7)), dataclasses.replace(GREEDY, max_tokens=3))
        for i in range(20)
    ]
    for request in requests:
        engine.add(request)
    drain(engine)
    starts = [request.metrics.first_scheduled_time for request in requests]
    assert starts == sorted(starts)
    assert all(request.metrics.num_preemptions == 0 for request in requests)


def test_a_prompt_is_scored_beside_a_long_prompt(served):
    """A step that scores has a program of its own; more tokens than it holds wait."""
    with mock.patch("kvjax.engine.MAX_SCORED_TOKENS", 16):
        small = tiny_engine()
    scored = dataclasses.replace(GREEDY, prompt_logprobs=0, max_tokens=2)
    pairs = [([9] * 60, GREEDY), ([8] * 60, scored), ([7] * 60, GREEDY), ([6] * 20, scored)]
    outputs = serve(small, *pairs)
    assert all(output.error is None for output in outputs)
    for output, (prompt, params) in zip(outputs, pairs, strict=True):
        assert output.prompt_logprobs == one(served, prompt, params).prompt_logprobs


# ---- the cache ----------------------------------------------------------------------------------

SHARED = "a system prompt that all requests begin with. "


def test_a_salt_keeps_tenants_apart(served):
    tokens = []
    for salt, hit in (("a", False), ("b", False), (None, False), ("a", True), (None, True)):
        params = dataclasses.replace(GREEDY, cache_salt=salt)
        output = one(served, SHARED, params)
        assert output.num_cached_tokens == (len(SHARED) - 1 if hit else 0)
        tokens.append(output.outputs[0].token_ids)
    assert len(set(tokens)) == 1


def test_resetting_the_cache_forgets_prefixes_and_frees_their_pages(served):
    one(served, SHARED, GREEDY)
    assert one(served, SHARED, GREEDY).num_cached_tokens > 0
    assert served[0].reset_prefix_cache() > 0
    assert served[0].scheduler.pool.num_free == served[0].scheduler.pool.num_pages
    assert one(served, SHARED, GREEDY).num_cached_tokens == 0


def test_a_request_may_refuse_to_read_the_cache(served):
    one(served, SHARED, GREEDY)
    params = dataclasses.replace(GREEDY, skip_reading_prefix_cache=True)
    assert one(served, SHARED, params).num_cached_tokens == 0


def test_a_hit_is_exact_to_the_token(served):
    one(served, SHARED + "dogs", GREEDY)
    assert one(served, SHARED + "does", GREEDY).num_cached_tokens == len(SHARED) + 2
    assert one(served, SHARED[:21], GREEDY).num_cached_tokens == 20


def test_requests_that_arrive_together_share_their_prefix(served):
    pairs = [(SHARED + name, GREEDY) for name in ("a", "bb", "ccc", "dddd")]
    before = served[0].runner.real_tokens
    outputs = serve(served, *pairs)
    # They wait for the first one's prefill until less than a page is left to gain.
    cached = [output.num_cached_tokens for output in outputs]
    assert cached[0] == 0
    assert all(len(SHARED) - 16 < count <= len(SHARED) for count in cached[1:])
    prompts = sum(len(output.prompt_token_ids) for output in outputs)
    assert served[0].runner.real_tokens - before == prompts - sum(cached) + 4 * 11


def test_what_is_reported_as_cached_is_what_the_first_start_found(served):
    engine, intake = served
    request = intake.request(SHARED, GREEDY)
    engine.add(request)
    for _ in range(4):
        engine.step()
    engine.scheduler.preempt(request.sequences[0])
    drain(engine)
    assert request.num_cached_tokens == 0
    assert request.metrics.num_preemptions == 1


# ---- what is refused, and what it leaves behind -------------------------------------------------

BAD_PROMPTS: list[tuple[Any, type[Exception], str]] = [
    ("", ValueError, "empty"),
    ([], ValueError, "no tokens"),
    ([1, 2, 256], ValueError, "256"),
    ([1, -1], ValueError, "-1"),
    ([1, 2.5], ValueError, "integers"),
    ([True, 1], ValueError, "integers"),
    (b"bytes", ValueError, "bytes"),
    (7, ValueError, "int"),
    ({"text": "x"}, ValueError, "prompt_token_ids"),
    ({"prompt_token_ids": "text"}, ValueError, "integers, got str"),
    ({"prompt_token_ids": 7}, ValueError, "integers, got int"),
    ({"messages": [1, 2]}, ValueError, "no chat template"),
    ([3] * 128, PromptTooLong, "128"),
]
BAD_PARAMS: list[tuple[dict[str, Any], str]] = [
    ({"stop_token_ids": [256]}, "256"),
    ({"allowed_token_ids": [999]}, "999"),
    ({"logit_bias": {300: 1.0}}, "300"),
    ({"min_tokens": 128, "max_tokens": None}, "128"),
    ({"bad_words": [chr(97 + i) for i in range(26)] + ["A", "B", "C", "D", "E", "F", "G"]}, "32"),
    ({"bad_words": ["a long word of many"]}, "8 tokens"),
]


@pytest.mark.parametrize(("prompt", "error", "said"), BAD_PROMPTS)
def test_a_bad_prompt_is_named_and_leaves_the_engine_serving(served, prompt, error, said):
    with pytest.raises(error, match=said):
        served[1].request(prompt, GREEDY)
    assert one(served, "abc", GREEDY).error is None


@pytest.mark.parametrize(("settings", "said"), BAD_PARAMS)
def test_bad_parameters_are_refused_before_any_step(served, settings, said):
    with pytest.raises(ValueError, match=said):
        served[1].request("abc", dataclasses.replace(GREEDY, **settings))
    assert one(served, "abc", GREEDY).error is None


def test_what_is_no_sampling_params_is_refused(served):
    with pytest.raises(ValueError, match="SamplingParams"):
        served[1].request("abc", {"max_tokens": 3})


def test_a_prompt_that_the_pool_can_never_hold_is_refused():
    _, _, intake = make_engine(num_pages=2)
    with pytest.raises(PromptTooLong, match="9 tokens; the KV cache holds 8"):
        intake.request([3] * 9, GREEDY)


def test_a_prompt_may_fill_the_pool_to_the_last_slot():
    engine, _, intake = make_engine(num_pages=2)
    output = one((engine, intake), [3] * 8, GREEDY)
    assert (output.error, output.outputs[0].finish_reason) == (None, "length")
    assert len(output.outputs[0].token_ids) == 1


def test_an_aborted_request_gives_its_pages_back_at_once(served):
    engine, intake = served
    request = intake.request("abc", dataclasses.replace(GREEDY, n=3, max_tokens=50))
    engine.add(request)
    for _ in range(4):
        engine.step()
    engine.abort(request)
    engine.abort(request)
    assert request.finished
    assert {s.finish_reason for s in request.sequences} == {"abort"}
    engine.reset_prefix_cache()
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages
    drain(engine)


def test_a_failed_request_says_why(served):
    engine, intake = served
    request = intake.request("abc", GREEDY)
    engine.add(request)
    engine.step()
    engine._fail(request, KVJaxError("because"))
    drain(engine)
    output = intake.output(request)
    assert str(output.error) == "because"
    assert request.sequences[0].status is Status.FINISHED
