"""Documents cut into chunks without losing anything at the seams.

Text that is cut and tokenised piece by piece has other tokens around each cut than the whole. Here
the whole is tokenised, and its tokens are cut: the chunks, one after the other, are the document.
"""

from kvjax.models.tokenizers import Tokenizer
from kvjax.request import Chunk

_SENTENCE_ENDS = tuple(mark + close for mark in (b".", b"!", b"?") for close in (b"", b'"', b")"))


def segment(text: str, tokenizer: Tokenizer, max_tokens: int) -> tuple[Chunk, ...]:
    """Chunks of `max_tokens` tokens at most, whose ids together are those of the document.

    Each ends at the last paragraph of its second half if there is one, else at the last sentence,
    else between two words; never inside a character, unless one alone is longer than `max_tokens`.

    Raises:
      ValueError: the text is empty, or `max_tokens` is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise ValueError(f"the document has no tokens: {text!r}")
    pieces = [tokenizer.token_bytes(i) for i in ids]
    chunks, start = [], 0
    while start < len(ids):
        stop = len(ids)
        if stop - start > max_tokens:
            cuts = range(start + max(1, max_tokens // 2), start + max_tokens + 1)
            stop = max(cuts, key=lambda cut: (_seam(pieces, start, cut), cut))
            if _seam(pieces, start, stop) < 0:  # every cut so far is inside a character
                cuts = range(start + 1, start + max_tokens + 1)
                stop = max(cuts, key=lambda cut: (_seam(pieces, start, cut), cut))
        chunks.append(Chunk(tuple(ids[start:stop])))
        start = stop
    return tuple(chunks)


def _seam(pieces: list[bytes], start: int, cut: int) -> int:
    """How good a place `cut` is: 3 a paragraph's end, 2 a sentence's, 1 a word's; -1 a character's
    inside."""
    before, after = b"".join(pieces[max(start, cut - 4) : cut]), pieces[cut]
    if after[:1] and 0x80 <= after[0] < 0xC0:
        return -1
    if before.endswith(b"\n\n"):
        return 3
    at_space = after[:1].isspace() or before[-1:].isspace()
    if before.endswith(b"\n") or (at_space and before.rstrip().endswith(_SENTENCE_ENDS)):
        return 2
    return int(at_space)
