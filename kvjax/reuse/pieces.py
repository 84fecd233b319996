"""What stands in front of a chunk of a prompt, piece by piece."""

from typing import NamedTuple

from kvjax.cache.chunks import tokens_hash
from kvjax.reuse.strategy import Prompt


class Piece(NamedTuple):
    """Tokens `[start, stop)` of a prompt: a chunk, or the text between two."""

    start: int
    stop: int
    name: str  # `tokens_hash`; "" for a text of no tokens
    is_chunk: bool


def pieces_before(prompt: Prompt, number: int) -> tuple[Piece, ...]:
    """Text, chunk, text, ... text in front of chunk `number`; any of these texts may be empty."""
    pieces, at = [], 0
    for segment in prompt.segments[: number + 1]:
        text = prompt.tokens[at : segment.start]
        pieces.append(Piece(at, segment.start, tokens_hash(text) if text else "", False))
        pieces.append(Piece(segment.start, segment.stop, segment.chunk, True))
        at = segment.stop
    return tuple(pieces[:-1])
