"""Chat templates render as they do in transformers, and say what is wrong with the messages."""

import datetime
from typing import Any

import pytest

from kvjax.models.chat import render_chat
from kvjax.models.checkpoint import open_checkpoint
from kvjax.models.tokenizers import load_tokenizer

HELLO = [{"role": "user", "content": "Hello"}]


def test_blocks_leave_no_white_space_behind():
    body = "    {% if true %}\n[{{ m.content }}]\n    {% endif %}\n"
    template = "{% for m in messages %}\n" + body + "{% endfor %}"
    assert render_chat(template, HELLO * 2) == "[Hello]\n[Hello]\n"


def test_the_generation_prompt_is_asked_for_or_not():
    template = "{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"
    assert render_chat(template, HELLO) == "Hello>"
    assert render_chat(template, HELLO, add_generation_prompt=False) == "Hello"


def test_json_is_written_as_models_saw_it():
    tools = [{"name": "<é> & 'x'", "arguments": {"b": 1, "a": [None, True]}}]
    expected = '{"name": "<é> & \'x\'", "arguments": {"b": 1, "a": [null, true]}}'
    assert render_chat("{{ tools[0] | tojson }}", HELLO, tools=tools) == expected
    template = "{{ tools[0].arguments | tojson(indent=1, sort_keys=true) }}"
    indented = '{\n "a": [\n  null,\n  true\n ],\n "b": 1\n}'
    assert render_chat(template, HELLO, tools=tools) == indented


def test_generation_marks_loop_controls_and_dates_are_understood():
    template = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') }}"
    )
    assert render_chat(template, HELLO * 3) == f"Hello{datetime.datetime.now().year}"


def test_extra_variables_reach_the_template():
    template = "{{ enable_thinking }}{{ documents | length }}"
    assert render_chat(template, HELLO, enable_thinking=False, documents=[1, 2]) == "False2"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("Hello", "list of tables, got str"),
        ({"role": "user"}, "list of tables, got dict"),
        ([], "empty"),
        (["Hello"], r"messages\[0\] must be a table, got str"),
        ([*HELLO, {"content": "Hello"}], r"messages\[1\] has no role"),
        ([{"role": 3, "content": "Hello"}], r"messages\[0\] has no role"),
    ],
)
def test_malformed_messages_are_described(messages: Any, reason):
    with pytest.raises(ValueError, match=reason):
        render_chat("{{ messages }}", messages)


def test_malformed_tools_are_described():
    with pytest.raises(ValueError, match=r"tools\[0\] must be a JSON schema, got str"):
        render_chat("{{ tools }}", HELLO, tools=["search"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("", "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "chat template"),
        ("{{ messages[0].content + messages[0].missing }}", "chat template"),
        ("{{ 'a' + none }}", "cannot render"),
        ("{{ messages.append(1) }}", "chat template"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template"),
    ],
)
def test_what_a_template_cannot_or_may_not_do_is_a_value_error(template, reason):
    with pytest.raises(ValueError, match=reason):
        render_chat(template, HELLO)


@pytest.mark.model
def test_the_default_model_speaks_chatml(smollm2_path):
    tokenizer = load_tokenizer(open_checkpoint(smollm2_path))
    system = [{"role": "system", "content": "Be brief."}]
    text = render_chat(tokenizer, system + HELLO)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render_chat(tokenizer, HELLO).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert [token_id for token_id in ids if token_id in tokenizer.special_ids] == [1, 2, 1, 2, 1]
