"""Prompts and conversations with marked chunks, as lists of texts and `Chunk`s."""

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from kvjax.models.chat import render_chat
from kvjax.models.tokenizers import Tokenizer
from kvjax.request import Chunk

T = TypeVar("T")


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

    Raises:
      ValueError: the template drops or repeats a chunk, or refuses the conversation.
    """
    chunks: StandIns[Chunk] = StandIns()

    def text(part: Any) -> str:
        if _is_chunk(part):
            return chunks.put(part if isinstance(part, Chunk) else Chunk(part["chunk"]))
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
    return chunks.cut(render_chat(tokenizer, plain))


class StandIns(Generic[T]):
    """Words that stand for chunks while a chat template is rendered: of letters and digits, which
    templates leave as they are, and which nobody can guess."""

    def __init__(self) -> None:
        self._word = f"chunk{secrets.token_hex(16)}n"
        self._chunks: list[T] = []

    def put(self, chunk: T) -> str:
        """The word that stands for a chunk."""
        self._chunks.append(chunk)
        return f"{self._word}{len(self._chunks) - 1}e"

    def cut(self, text: str) -> list[str | T]:
        """The rendered text with the chunks in their places.

        Raises:
          ValueError: the template drops, repeats or changes a word.
        """
        found = re.split(f"{self._word}([0-9]+)e", text)
        numbers = [int(number) for number in found[1::2]]
        if sorted(numbers) != list(range(len(self._chunks))):
            raise ValueError(
                f"the chat template does not write each of {len(self._chunks)} chunks once, "
                f"got {numbers}"
            )
        parts: list[str | T] = list(found)
        parts[1::2] = [self._chunks[number] for number in numbers]
        return [part for part in parts if part != ""]


def _is_chunk(part: Any) -> bool:
    return isinstance(part, Chunk) or (isinstance(part, Mapping) and set(part) == {"chunk"})
