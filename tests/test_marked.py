"""Chunks marked in prompts, in conversations and in lines of JSON mean the same chunks."""

import json

import pytest

from kvjax import LLM, Chunk, SamplingParams
from kvjax.jsonl import Line, output_record, parse_json
from kvjax.marked import chat_parts
from kvjax.models.chat import render_chat
from tests.tiny_model import LetterTokenizer, tiny

A, B = "the keeper is Farid, ", "his code is 4817; "


class ChattyTokenizer(LetterTokenizer):
    chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[end]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )


class Repeating(LetterTokenizer):
    chat_template = "{{ messages[0].content }}{{ messages[0].content }}"


MESSAGES = [
    {"role": "system", "content": "Be terse."},
    {
        "role": "user",
        "content": [Chunk(A), {"type": "text", "text": " and "}, {"chunk": B}, "Who?"],
    },
]


def test_a_marked_conversation_is_the_templates_text_with_its_chunks_apart():
    parts = chat_parts(ChattyTokenizer(), MESSAGES)
    assert [part for part in parts if isinstance(part, Chunk)] == [Chunk(A), Chunk(B)]
    plain = [MESSAGES[0], {"role": "user", "content": A + " and " + B + "Who?"}]
    joined = "".join(str(part.content) if isinstance(part, Chunk) else part for part in parts)
    assert joined == render_chat(ChattyTokenizer(), plain)


def test_a_template_that_repeats_a_chunk_is_refused():
    with pytest.raises(
        ValueError, match=r"does not write each of 2 chunks once, got \[0, 1, 0, 1\]"
    ):
        chat_parts(Repeating(), MESSAGES[1:])


def test_a_part_that_is_neither_text_nor_chunk_is_named():
    image = {"role": "user", "content": [{"chunk": A}, {"type": "image_url", "image_url": "x"}]}
    with pytest.raises(ValueError, match="image_url"):
        chat_parts(ChattyTokenizer(), [image])


def test_text_that_looks_like_a_chunk_is_text():
    content = [Chunk(A), "chunk0n0e and chunk1n"]
    parts = chat_parts(ChattyTokenizer(), [{"role": "user", "content": content}])
    assert parts == ["[user]", Chunk(A), "chunk0n0e and chunk1n[end][assistant]"]


def test_chunks_of_a_conversation_are_reused(monkeypatch):
    llm = tiny(LLM, fresh=True, num_pages=64, max_model_len=256)
    monkeypatch.setattr(llm._intake, "tokenizer", ChattyTokenizer())
    params = SamplingParams(temperature=0, max_tokens=2, reuse="naive")
    (out,) = llm.chat(MESSAGES, params)
    assert out.reuse is not None
    assert out.reuse.shifted == len(A) + len(B)
    assert len(llm.chunks.list()) == 2
    llm.reset_prefix_cache()
    (swapped,) = llm.chat([{"role": "user", "content": [{"chunk": B}, Chunk(A), "?"]}], params)
    assert swapped.reuse is not None
    assert swapped.reuse.shifted == len(A) + len(B)
    assert len(llm.chunks.list()) == 2


def test_the_record_of_a_prompt_with_chunks_says_what_became_of_its_tokens():
    llm = tiny(LLM, fresh=True, num_pages=64, max_model_len=256)
    prompt = ["Read: ", Chunk(A), "Who?"]
    (out,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=2, reuse="naive"))
    (layers,) = json.loads(json.dumps(output_record(out)))["reuse"]["layers"]
    counts = [layers[name] for name in ("exact", "shifted", "recomputed", "computed")]
    assert counts == [0, len(A), 0, len("Read: Who?")]
    (plain,) = llm.generate(["Read"], SamplingParams(temperature=0, max_tokens=2))
    assert "reuse" not in output_record(plain)


def parsed(**fields):
    return parse_json(Line(1, json.dumps(fields).encode()), SamplingParams()).prompt


def test_a_line_marks_chunks_in_its_prompt_or_its_messages():
    assert parsed(prompt=["Read: ", {"chunk": A}, {"chunk": [1, 2]}, "Who?"]) == {
        "prompt": ["Read: ", Chunk(A), Chunk((1, 2)), "Who?"]
    }
    messages = [{"role": "user", "content": [{"chunk": A}, "Who?"]}]
    assert parsed(messages=messages) == {"messages": messages}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (["only", "texts"], 'needs a {"chunk": text}'),
        ([], 'needs a {"chunk": text}'),
        (["text", {"chunk": ""}], "must not be empty"),
        (["text", {"chunks": A}], 'is text or {"chunk": text}'),
        (["text", 7], "got 7"),
        (7, "text or a list of texts and chunks, got int"),
    ],
)
def test_a_prompt_of_wrong_parts_is_told(prompt, message):
    with pytest.raises(ValueError, match=message):
        parsed(prompt=prompt)
