"""Sampling parameters are checked when made; outputs and metrics are plain values."""

import dataclasses
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest

from kvjax.request import (
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)

MAKE: Any = SamplingParams  # for arguments that are wrong on purpose, or chosen by name
NAN, INF = float("nan"), float("inf")


def test_defaults_are_those_of_vllm_where_it_has_the_field():
    params = dataclasses.asdict(SamplingParams())
    assert params == {
        "n": 1,
        "max_tokens": 16,
        "min_tokens": 0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": None,
        "branch": 0,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "logprobs": None,
        "prompt_logprobs": None,
        "logit_bias": None,
        "reuse": None,
        "allowed_token_ids": None,
        "bad_words": (),
        "structured_outputs": None,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
        "priority": 0,
        "cache_salt": None,
        "skip_reading_prefix_cache": False,
        "extra_args": None,
    }


BAD = [  # field, value, what the message says of the limit
    ("n", 0, "[1, 16384], got 0"),
    ("n", True, "integer in [1, 16384], got True"),
    ("n", 1.5, "integer in [1, 16384], got 1.5"),
    ("temperature", 1e300, "finite number"),
    ("repetition_penalty", 1e-320, "finite number"),
    ("max_tokens", 0, "[1, 2147483647], got 0"),
    ("max_tokens", "many", "got 'many'"),
    ("min_tokens", -1, "got -1"),
    ("min_tokens", 17, "<= max_tokens=16, got 17"),
    ("temperature", "hot", "number in [0.0, inf), got 'hot'"),
    ("temperature", True, "number in [0.0, inf), got True"),
    ("temperature", -0.1, "finite number in [0.0, inf), got -0.1"),
    ("temperature", NAN, "finite number in [0.0, inf), got nan"),
    ("temperature", INF, "finite number in [0.0, inf), got inf"),
    ("temperature", 10**400, "finite number"),
    ("temperature", None, "got None"),
    ("top_p", 0, "(0.0, 1.0], got 0"),
    ("top_p", 1.01, "(0.0, 1.0], got 1.01"),
    ("top_p", NAN, "got nan"),
    ("top_k", -2, "[-1, 2147483647], got -2"),
    ("top_k", 2.0, "integer"),
    ("min_p", 1.1, "[0.0, 1.0], got 1.1"),
    ("presence_penalty", 2.1, "[-2.0, 2.0], got 2.1"),
    ("frequency_penalty", -INF, "[-2.0, 2.0], got -inf"),
    ("repetition_penalty", 0, "(0.0, inf), got 0"),
    ("seed", -2, "[0, 18446744073709551615], got -2"),
    ("seed", 2**64, "got 18446744073709551616"),
    ("seed", "x", "got 'x'"),
    ("stop", [""], "non-empty strings only, got ''"),
    ("stop", "", "non-empty strings only, got ''"),
    ("stop", [3], "non-empty strings only, got 3"),
    ("stop", 3, "a string or a list of strings, got 3"),
    ("stop", b"end", "got b'end'"),
    ("stop_token_ids", [-1], "[0, 2147483647], got -1"),
    ("stop_token_ids", 4, "a list of token ids, got 4"),
    ("stop_token_ids", list(range(25)), "at most 24 ids, got 25"),
    ("ignore_eos", 1, "True or False, got 1"),
    ("skip_special_tokens", None, "True or False, got None"),
    ("logprobs", 21, "[0, 20], got 21"),
    ("logprobs", -1, "[0, 20], got -1"),
    ("logprobs", True, "got True"),
    ("prompt_logprobs", 21, "[0, 20], got 21"),
    ("logit_bias", [1], "map token ids to numbers, got [1]"),
    ("logit_bias", {"1": 1.0}, "got '1'"),
    ("logit_bias", {1: NAN}, "logit_bias[1] must be a finite number in [-100.0, 100.0], got nan"),
    ("logit_bias", {1: 101}, "[-100.0, 100.0], got 101"),
    ("allowed_token_ids", [], "at least one id"),
    ("allowed_token_ids", "abc", "a list of token ids, got 'abc'"),
    ("bad_words", [""], "non-empty strings only"),
    ("priority", 0.5, "got 0.5"),
    ("cache_salt", "", "non-empty string, got ''"),
    ("cache_salt", 3, "non-empty string, got 3"),
    ("skip_reading_prefix_cache", "no", "True or False, got 'no'"),
    ("extra_args", 3, "mapping with string keys, got 3"),
    ("extra_args", {1: 2}, "mapping with string keys"),
]


@pytest.mark.parametrize(
    ("field", "value", "limit"), BAD, ids=[f"{f}={v!r:.20}" for f, v, _ in BAD]
)
def test_a_bad_value_is_refused_with_field_value_and_limit(field, value, limit):
    with pytest.raises(ValueError, match=field) as refusal:
        MAKE(**{field: value})
    assert limit in str(refusal.value)


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="temprature"):
        MAKE(temprature=1)


def test_values_are_normalised():
    params = SamplingParams(
        temperature=0,
        seed=-1,
        stop="end",
        stop_token_ids=[3, 4],
        bad_words=["a", "b"],
        max_tokens=None,
        extra_args={"window": [1, {"x": {2}}]},
    )
    assert isinstance(params.temperature, float)
    assert params.seed is None
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3, 4)
    assert params.bad_words == ("a", "b")
    assert params.extra_args is not None
    assert params.extra_args["window"] == (1, {"x": frozenset({2})})


def test_parameters_are_immutable_hashable_and_survive_copies():
    def make():
        return SamplingParams(
            stop=["a"], logit_bias={3: 1, 4: -2.5}, allowed_token_ids=[4, 3], extra_args={"a": [1]}
        )

    params = make()
    assert params == make()
    assert hash(params) == hash(make())
    assert len({params, make(), dataclasses.replace(params, n=2)}) == 2
    assert pickle.loads(pickle.dumps(params)) == params
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        params.logit_bias[3] = 0  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]


def test_numpy_numbers_are_numbers():
    import numpy as np

    params = MAKE(
        temperature=np.float32(0.5), top_k=np.int64(3), stop_token_ids=np.arange(2).tolist()
    )
    assert (params.temperature, params.top_k) == (0.5, 3)
    with pytest.raises(ValueError, match="n must be an integer"):
        MAKE(n=np.bool_(True))


def test_model_limits_are_checked_when_the_model_is_known():
    SamplingParams(stop_token_ids=[99], logit_bias={99: 1}, allowed_token_ids=[99]).validate_for(
        100, 64
    )
    for field, value in (
        ("stop_token_ids", [100]),
        ("logit_bias", {100: 1.0}),
        ("allowed_token_ids", [0, 100]),
    ):
        with pytest.raises(ValueError, match=f"{field} must hold ids below .* 100, got 100"):
            MAKE(**{field: value}).validate_for(100, 64)
    with pytest.raises(ValueError, match="min_tokens must be below max_model_len=64, got 64"):
        SamplingParams(min_tokens=64, max_tokens=None).validate_for(100, 64)


@pytest.mark.parametrize(
    ("params", "needed"),
    [
        ({}, False),
        ({"min_tokens": 3, "top_p": 0.5, "stop_token_ids": [1]}, False),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"logit_bias": {}}, False),
        ({"logit_bias": {1: 1}}, True),
        ({"allowed_token_ids": [1]}, True),
        ({"bad_words": ["x"]}, True),
    ],
)
def test_only_requests_with_per_seat_features_need_their_seat_loaded(params, needed):
    assert MAKE(**params).needs_seat_features is needed


def test_metrics_derive_from_times_and_are_none_before_them():
    metrics = RequestMetrics(arrival_time=10.0)
    assert metrics.time_in_queue is None
    assert metrics.time_to_first_token is None
    assert metrics.time_per_output_token is None
    metrics.first_scheduled_time, metrics.first_token_time = 10.5, 11.0
    metrics.finished_time, metrics.num_output_tokens = 13.0, 5
    assert metrics.time_in_queue == 0.5
    assert metrics.time_to_first_token == 1.0
    assert metrics.time_per_output_token == 0.5
    metrics.num_output_tokens = 1
    assert metrics.time_per_output_token is None


def test_an_output_is_finished_when_it_has_a_reason():
    part = CompletionOutput(index=0, text="a", token_ids=(1,), logprobs=({1: Logprob(-0.5, 1)},))
    assert not part.finished
    done = dataclasses.replace(part, finish_reason="stop", stop_reason="end")
    assert done.finished
    out = RequestOutput(
        request_id="0", prompt=None, prompt_token_ids=(5,), outputs=(done,), finished=True
    )
    assert out.outputs[0].stop_reason == "end"
    assert math.isclose(out.outputs[0].logprobs[0][1].logprob, -0.5)  # pyright: ignore


def test_request_data_need_no_jax():
    code = "import sys, kvjax.request; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
