"""Prompts and conversations with marked chunks, as lists of texts and `Chunk`s."""

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from kvjax.models.chat import render_chat
from kvjax.models.tokenizers import Tokenizer
from kvjax.request import Chunk


def is_marked(prompt: Any) -> bool:
    """Whether a prompt is a list of chunks and, between them, texts or tuples of token ids."""
    if not isinstance(prompt, list | tuple) or not prompt:
        return False
    return any(isinstance(part, Chunk) for part in prompt) and all(
        isinstance(part, str | Chunk | tuple) for part in prompt
    )


def part_of(part: Any) -> str | Chunk:
    """A part of a prompt in JSON: text, or `{"chunk": text or ids}`."""
    if isinstance(part, str | Chunk):
        return part
    if isinstance(part, Mapping) and set(part) == {"chunk"}:
        return Chunk(part["chunk"])
    raise ValueError(f'a part of a prompt is text or {{"chunk": text}}, got {part!r}')


def has_chunks(messages: Any) -> bool:
    """Whether the content of a message is a list of parts with a chunk among them."""
    return isinstance(messages, Sequence) and any(
        isinstance(message, Mapping)
        and isinstance(message.get("content"), list | tuple)
        and any(map(_is_chunk, message["content"]))
        for message in messages
    )


def chat_parts(tokenizer: Tokenizer, messages: Sequence[Any]) -> list[str | Chunk]:
    """A conversation as the template writes it, ready for the answer, its chunks still marked.

    The template sees a word of letters and digits in place of each chunk.

    Raises:
      ValueError: the template drops or repeats a chunk, or refuses the conversation.
    """
    word, chunks = f"chunk{secrets.token_hex(16)}n", []

    def text(part: Any) -> str:
        if _is_chunk(part):
            chunks.append(part_of(part))
            return f"{word}{len(chunks) - 1}e"
        if isinstance(part, Mapping) and part.get("type") == "text":
            part = part.get("text")
        if isinstance(part, str):
            return part
        raise ValueError(f'a part of a message is text or {{"chunk": text}}, got {part!r}')

    plain = [
        {**message, "content": "".join(map(text, message["content"]))}
        if has_chunks([message])
        else message
        for message in messages
    ]
    found = re.split(f"{word}([0-9]+)e", render_chat(tokenizer, plain))
    numbers = [int(number) for number in found[1::2]]
    if sorted(numbers) != list(range(len(chunks))):
        raise ValueError(
            f"the chat template does not write each of {len(chunks)} chunks once, got {numbers}"
        )
    parts: list[str | Chunk] = list(found)
    parts[1::2] = [chunks[number] for number in numbers]
    return [part for part in parts if part != ""]


def _is_chunk(part: Any) -> bool:
    return isinstance(part, Chunk) or (isinstance(part, Mapping) and set(part) == {"chunk"})
