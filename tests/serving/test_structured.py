"""Structured output over HTTP, and with the `openai` package's own helpers."""

import json
import re

import openai
import pydantic
import pytest

ASK = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 200, "seed": 3}


class City(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=8)
    large: bool


def content(served, **body):
    status, answer = served.post("/v1/chat/completions", {**ASK, **body})
    assert status == 200, answer
    assert answer["choices"][0]["finish_reason"] == "stop"
    return answer["choices"][0]["message"]["content"]


def test_an_answer_has_the_format_that_was_asked_for(served):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}}
    schema |= {"required": ["n"], "additionalProperties": False}
    named = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    assert set(json.loads(content(served, response_format=named))) == {"n"}
    for asked, pattern in (
        ({"regex": "[a-z]{4}"}, "[a-z]{4}"),
        ({"choice": ["left", "right"]}, "left|right"),
        ({"grammar": 'start: "a"~3'}, "aaa"),
    ):
        assert re.fullmatch(pattern, content(served, structured_outputs=asked))
    text = served.post(
        "/v1/completions",
        {"prompt": "{", "max_tokens": 200, "structured_outputs": {"json": schema}},
    )[1]["choices"][0]["text"]
    assert set(json.loads(text)) == {"n"}


def test_the_clients_parse_helper_gets_its_model(served):
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.parse(
        model="tiny", messages=[{"role": "user", "content": "a city"}], response_format=City,
        max_tokens=200, seed=4,
    )  # fmt: skip
    assert isinstance(answer.choices[0].message.parsed, City)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"structured_outputs": {"regex": "(("}}, "structured_outputs"),
        ({"structured_outputs": {}}, "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "exactly one"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "either",
        ),
    ],
)
def test_a_format_that_cannot_be_is_400(served, body, says):
    status, answer = served.post("/v1/chat/completions", {**ASK, **body})
    assert (status, says in answer["error"]["message"]) == (400, True), answer
