"""Tools: calls that are asked for, calls that the model chooses, and text that is no call."""

import json
from typing import Any

import openai
import pytest

from kvjax.serving.replies import ChatChunk, ChatReply
from kvjax.serving.tools import CALL_FORMATS, ToolReader, bound_to_calls, call_format

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "time", "description": "What time it is."}}
MESSAGES: Any = [{"role": "user", "content": "?"}]
ASK = {"messages": MESSAGES, "max_tokens": 150, "seed": 1}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'


def chat(served, **body) -> dict[str, Any]:
    status, answer = served.post("/v1/chat/completions", {**ASK, **body})
    assert status == 200, answer
    ChatReply.model_validate(answer)
    return answer["choices"][0]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_call_that_is_asked_for_is_made_with_arguments_of_its_schema(served, choice):
    answer = chat(served, tools=[WEATHER], tool_choice=choice)
    assert answer["finish_reason"] == "tool_calls"
    (call,) = answer["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
    assert answer["message"]["content"] is None


def test_calls_that_the_model_writes_are_read_and_the_text_before_them_kept(served):
    written = {"regex": "see " + CALL.replace("{", r"\{").replace("}", r"\}") * 2}
    answer = chat(served, tools=[WEATHER, TIME], structured_outputs=written)
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] == "see "
    calls = answer["message"]["tool_calls"]
    assert [json.loads(c["function"]["arguments"]) for c in calls] == [{"city": "Rome"}] * 2
    assert len({c["id"] for c in calls}) == 2


def test_a_stream_shows_the_text_and_then_the_calls(served):
    written = {"regex": "so <b> " + CALL.replace("{", r"\{").replace("}", r"\}")}
    body = {**ASK, "tools": [WEATHER], "structured_outputs": written}
    choices = [e["choices"][0] for e in served.stream("/v1/chat/completions", body)]
    for event in served.stream("/v1/chat/completions", body):
        ChatChunk.model_validate(event)
    assert "".join(c["delta"].get("content") or "" for c in choices) == "so <b> "
    (calls,) = [c["delta"]["tool_calls"] for c in choices if "tool_calls" in c["delta"]]
    assert calls[0]["index"] == 0
    assert calls[0]["function"]["name"] == "weather"
    assert choices[-1]["finish_reason"] == "tool_calls"


def test_no_call_is_made_when_none_is_wanted_or_written(served):
    for choice in ("none", "auto"):
        written = {"regex": "just text"}
        answer = chat(served, tools=[WEATHER], tool_choice=choice, structured_outputs=written)
        assert answer["message"] == {"role": "assistant", "content": "just text"}
        assert answer["finish_reason"] == "stop"


def test_the_openai_client_reads_calls_and_sends_results_back(served):
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    tools: Any = [WEATHER]
    first = client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=tools, tool_choice="required", max_tokens=150
    )
    said = first.choices[0].message
    assert said.tool_calls is not None
    result: Any = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "sunny"}
    history: Any = [*MESSAGES, said.model_dump(exclude_none=True), result]
    second = client.chat.completions.create(
        model="tiny", messages=history, tools=tools, max_tokens=4, extra_body={"ignore_eos": True}
    )
    assert second.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"tool_choice": "required"}, "needs tools"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "'x'",
        ),
        (
            {"tools": [WEATHER], "tool_choice": "required", "structured_outputs": {"regex": "a"}},
            "tool_choice",
        ),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "name"),
    ],
)
def test_tools_that_cannot_be_are_400(served, body, says):
    status, answer = served.post("/v1/chat/completions", {**ASK, **body})
    assert (status, says in answer["error"]["message"]) == (400, True), answer


def test_the_format_follows_the_template_and_one_without_tools_is_refused():
    assert call_format("{{ tools }} <tool_call>") == CALL_FORMATS["hermes"]
    assert call_format("{{ tools }} [TOOL_CALLS]") == CALL_FORMATS["mistral"]
    assert call_format("{{ tools }}").opening == ""
    with pytest.raises(ValueError, match="takes no tools"):
        call_format("{{ messages }}")


def test_what_is_no_valid_call_stays_text():
    reader = ToolReader(CALL_FORMATS["hermes"], bound=False)
    for text in ("<tool_call>oops", '<tool_call>{"n": 1}</tool_call>', "plain", ""):
        assert reader.read(text) == (text, [])
    assert [reader.shown(text) for text in ("a <tool", "a <tool_call>{", "a <b")] == [
        "a ", "a ", "a <b",
    ]  # fmt: skip
    bare = ToolReader(call_format("tools"), bound=False)
    assert bare.shown('{"name"') == ""
    said, (call,) = bare.read('{"name": "f", "parameters": {"x": 1}}')
    assert (said, call["function"]) == ("", {"name": "f", "arguments": '{"x": 1}'})
    listed = ToolReader(CALL_FORMATS["mistral"], bound=False)
    assert len(listed.read('[TOOL_CALLS][{"name": "f"}, {"name": "g"}]')[1]) == 2


def test_any_of_several_tools_may_be_called():
    asked = bound_to_calls([WEATHER, TIME], None)
    schema = json.loads(str(asked.json))
    assert [s["properties"]["name"]["const"] for s in schema["anyOf"]] == ["weather", "time"]
