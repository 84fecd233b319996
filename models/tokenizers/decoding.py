"""Token ids -> text, all at once or one by one with the same result.

Every token stands for fixed bytes, and text is the UTF-8 of their concatenation. So a decoder that
goes token by token needs to keep at most three bytes, and no window of earlier tokens.
"""

import codecs
from collections.abc import Iterable
from typing import Protocol


class TokenBytes(Protocol):
    """The part of a tokenizer that decoding needs; see `kvjax.models.tokenizers.Tokenizer`."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    @property
    def strips_leading_space(self) -> bool: ...

    def token_bytes(self, token_id: int) -> bytes: ...


def decode(tokenizer: TokenBytes, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
    """Text of `ids`; each maximal run of bytes that is no UTF-8 becomes U+FFFD."""
    skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
    data = b"".join(tokenizer.token_bytes(i) for i in ids if i not in skipped)
    text = data.decode("utf-8", "replace")
    return text.removeprefix(" ") if tokenizer.strips_leading_space else text


class IncrementalDecoder:
    """Text of a growing sequence, piece by piece.

    The pieces that `push` returned, and `flush` at the end, concatenate to what
    `tokenizer.decode` gives for all the ids; or, if it `continues` a text, to what they add to that
    text. (They differ by the space that some tokenizers put in front of a text, and only there.)
    """

    def __init__(
        self, tokenizer: TokenBytes, skip_special_tokens: bool = True, *, continues: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips = tokenizer.strips_leading_space and not continues

    def push(self, token_id: int) -> str:
        """The text that this token completes; a character cut off at the end is held back."""
        if token_id in self._skipped:
            return ""
        return self._emit(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """U+FFFD for a character that is still incomplete, else nothing. Call once, at the end."""
        return self._emit(self._utf8.decode(b"", final=True))

    def _emit(self, text: str) -> str:
        if self._strips and text:
            self._strips = False
            return text.removeprefix(" ")
        return text
