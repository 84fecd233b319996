"""What the endpoints answer: shapes, contents, and equality with the library."""

import json
from typing import Any

import pytest

from kvjax import LLM, SamplingParams, __version__
from kvjax.serving import replies
from tests.serving.live_server import ENGINE, Client

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def library(tiny_path) -> LLM:
    return LLM(tiny_path, **{k: v for k, v in ENGINE.items() if k != "max_num_seqs"})


def completion(served: Client, **body: Any) -> dict[str, Any]:
    status, answer = served.post("/v1/completions", {"model": "tiny", **GREEDY, **body})
    assert status == 200, answer
    replies.CompletionReply.model_validate(answer)
    return answer


def chat(served: Client, **body: Any) -> dict[str, Any]:
    status, answer = served.post("/v1/chat/completions", {"messages": HELLO, **GREEDY, **body})
    assert status == 200, answer
    replies.ChatReply.model_validate(answer)
    return answer


def test_completions_are_those_of_the_library(served, library):
    prompts = ["one fox", "two dogs run and run"]
    expected = library.generate(prompts, SamplingParams(**GREEDY, n=2, seed=3))
    answer = completion(served, prompt=prompts, n=2, seed=3, return_token_ids=True)
    choices = answer["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2, 3]
    assert [tuple(c["token_ids"]) for c in choices] == [
        c.token_ids for o in expected for c in o.outputs
    ]
    assert [c["text"] for c in choices] == [c.text for o in expected for c in o.outputs]
    assert {c["finish_reason"] for c in choices} == {"length"}
    assert answer["usage"]["completion_tokens"] == 24


def test_a_stream_adds_up_to_the_answer_that_is_not_streamed(served):
    body = {"prompt": "the sea", "n": 3, "temperature": 1.0, "seed": 5}
    whole = completion(served, **body, max_tokens=12)
    events = served.stream(
        "/v1/completions",
        {**GREEDY, **body, "max_tokens": 12, "stream_options": {"include_usage": True}},
    )
    for event in events:
        replies.CompletionReply.model_validate(event)
    *pieces, last = events
    for index in range(3):
        choices = [c for e in pieces for c in e["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in choices) == whole["choices"][index]["text"]
        assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
        assert choices[-1]["finish_reason"] == "length"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 36


@pytest.mark.parametrize("details", [{}, {"logprobs": True, "top_logprobs": 2}])
def test_a_streamed_chat_adds_up_to_the_whole(served, details):
    whole = chat(served, **details)["choices"][0]
    events = served.stream("/v1/chat/completions", {"messages": HELLO, **GREEDY, **details})
    for event in events:
        replies.ChatChunk.model_validate(event)
    choices = [e["choices"][0] for e in events]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(c["delta"].get("content", "") for c in choices)
    assert text == whole["message"]["content"]
    assert choices[-1]["finish_reason"] == whole["finish_reason"] == "length"
    streamed = [t for c in choices if c["logprobs"] for t in c["logprobs"]["content"]]
    assert streamed == (whole["logprobs"]["content"] if details else [])


def test_a_chat_continues_the_rendered_template(served):
    answer = chat(served, return_token_ids=True)
    rendered = "<|user|>hello<|end|><|assistant|>"
    status, tokenized = served.post("/tokenize", {"messages": HELLO})
    assert status == 200
    assert answer["choices"][0]["prompt_token_ids"] == tokenized["tokens"]
    status, text = served.post("/detokenize", {"tokens": tokenized["tokens"]})
    assert (status, text) == (200, {"prompt": rendered})


def test_the_second_time_a_prompt_is_cached_but_for_its_last_token(served):
    prompt = "a prompt that nobody has sent before, of some length"
    first, second = completion(served, prompt=prompt), completion(served, prompt=prompt)
    num = len(prompt)
    assert first["usage"]["prompt_tokens"] == num
    assert second["usage"]["prompt_tokens_details"] == {"cached_tokens": num - 1}
    assert first["choices"] == second["choices"]
    salted = completion(served, prompt=prompt, cache_salt="another")
    assert salted["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_logprobs_echo_and_text_offsets_fit_the_text(served):
    answer = completion(served, prompt="abcdef", echo=True, logprobs=3)
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"][:6]) == "abcdef"
    assert choice["text"].startswith("abcdef")
    assert logprobs["token_logprobs"][0] is None
    assert all(p < 0 for p in logprobs["token_logprobs"][1:])
    assert all(len(top) <= 3 for top in logprobs["top_logprobs"][1:])
    assert logprobs["text_offset"][:6] == [0, 1, 2, 3, 4, 5]


def test_stop_bias_and_token_lists_act(served):
    forced = completion(served, prompt="ab", logit_bias={"65": 100}, max_tokens=3)
    assert len({*forced["choices"][0]["text"]}) == 1
    letter = forced["choices"][0]["text"][0]
    stopped = completion(served, prompt="ab", logit_bias={"65": 100}, stop=[letter * 2])
    assert stopped["choices"][0] | {"text": ""} == {
        "index": 0, "text": "", "logprobs": None, "finish_reason": "stop",
        "stop_reason": letter * 2,
    }  # fmt: skip
    only = completion(served, prompt="ab", allowed_token_ids=[70, 71], return_token_ids=True)
    assert {*only["choices"][0]["token_ids"]} <= {70, 71}


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/completions", {"prompt": ""}, 400, "empty"),
        ("/v1/completions", {"prompt": [5, 9999]}, 400, "9999"),
        ("/v1/completions", {"prompt": "x" * 300}, 400, "max_model_len=256"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "x", "temprature": 0}, 400, "temprature"),
        ("/v1/completions", {"prompt": "x", "logprobs": 21}, 400, "20"),
        ("/v1/completions", {"prompt": "x", "model": "gpt"}, 404, "'gpt'"),
        ("/v1/completions", {"prompt": "\ud800"}, 400, ""),
        ("/v1/completions", b'{"prompt": "x"', 400, "JSON"),
        ("/v1/completions", b'{"prompt": "\xff"}', 400, ""),
        ("/v1/completions", b"[" * 200_000, 400, ""),
        ("/v1/completions", b'{"n": ' + b"1" * 9000 + b"}", 400, ""),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": HELLO, "top_logprobs": 3}, 400, "logprobs=true"),
        ("/v1/chat/completions", {"messages": [{"role": "cat", "content": "x"}]}, 400, "role"),
        ("/tokenize", {}, 400, "either"),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_openais_words_before_any_work(served, path, body, status, says):
    computed = served.engine.runner.real_tokens
    got, answer = served.post(path, body)
    assert got == status
    replies.ErrorReply.model_validate(answer)
    assert says in answer["error"]["message"]
    assert served.engine.runner.real_tokens == computed


def test_an_unknown_path_or_method_has_the_same_kind_of_body(served):
    for method, path, status in (("GET", "/nowhere", 404), ("GET", "/v1/completions", 405)):
        answer = served.request(method, path)
        assert answer.status == status
        replies.ErrorReply.model_validate(json.loads(answer.read()))


def test_the_server_describes_itself(served):
    assert served.get("/health") == (200, {"status": "ok"})
    assert served.get("/ready") == (200, {"status": "ok"})
    assert served.get("/version")[1]["version"] == __version__
    (card,) = served.get("/v1/models")[1]["data"]
    assert (card["id"], card["max_model_len"]) == ("tiny", 256)
    assert served.get("/v1/models/tiny") == (200, card)
    assert served.get("/v1/models/gpt")[0] == 404


def test_an_answer_bears_the_id_of_its_request(served):
    for given, kept in (("mine-7", True), ("no\tword", False), ("x" * 200, False)):
        answer = served.request("GET", "/health", headers={"X-Request-Id": given})
        assert (answer.headers["X-Request-Id"] == given) is kept


def test_metrics_count_what_happened(served):
    before = {n: served.metric(n) for n in ("generation_tokens_total", "prompt_tokens_total")}
    completion(served, prompt="count me", n=2)
    assert served.metric("generation_tokens_total") == before["generation_tokens_total"] + 12
    assert served.metric("prompt_tokens_total") == before["prompt_tokens_total"] + 8
    assert served.metric("num_requests_running") == 0
    assert served.metric("iteration_tokens_total_count") > 0
    assert (served.metric("step_token_budget"), served.metric("out_of_memory_total")) == (64, 0)
    hits = served.metric("prefix_cache_hits_total")
    completion(served, prompt="count me")
    assert served.metric("prefix_cache_hits_total") == hits + 7


def test_nothing_is_compiled_after_the_server_is_ready(served):
    before = served.metric("compilations_total")
    completion(served, prompt=["a", "b" * 100, "c" * 50], n=2, logprobs=2, presence_penalty=0.5)
    chat(served, prompt_logprobs=1)
    assert served.metric("compilations_total") == before


def test_reset_forgets_and_stats_add_up(served):
    served.drop_chunks()
    completion(served, prompt="remember this for a while")
    pages = served.get("/v1/kv/stats")[1]["pages"]
    assert pages["cached_only"] > 0
    status, answer = served.post("/v1/kv/reset", {})
    assert (status, answer) == (200, {"freed_pages": pages["cached_only"]})
    stats = served.get("/v1/kv/stats")[1]
    replies.KVStats.model_validate(stats)
    assert stats["pages"]["free"] == stats["pages"]["total"]
