"""`tokenizer.json`, run by the `tokenizers` library."""

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

import tokenizers

from kvjax.errors import TokenizerNotFound
from kvjax.models.checkpoint import Checkpoint
from kvjax.models.tokenizers.decoding import decode
from kvjax.models.tokenizers.folder import read_settings

FILE = "tokenizer.json"
_LONG = 4096  # characters; from there on other threads run meanwhile: a batch releases the GIL

PieceRule = Callable[[str], bytes]  # a token as the vocabulary writes it -> its bytes


class HuggingFaceTokenizer:
    """See `kvjax.models.tokenizers.Tokenizer`. Owns `inner`."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        piece_rule: PieceRule,
        strips_leading_space: bool,
        bos_token_id: int | None,
        eos_token_ids: tuple[int, ...],
        chat_template: str | None,
        fingerprint: str,
    ) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._piece_rule = piece_rule
        self.strips_leading_space = strips_leading_space
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.chat_template = chat_template
        self.fingerprint = fingerprint
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = inner.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._bytes = {i: token.content.encode() for i, token in added.items()}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """See the protocol. Raises `ValueError` for half a surrogate pair, which is no text."""
        try:
            if len(text) > _LONG:
                batch = self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)
                return batch[0].ids
            return self._inner.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            raise ValueError(f"text must be a str of whole characters, got {text!r:.80}") from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """See the protocol."""
        return decode(self, ids, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """See the protocol."""
        data = self._bytes.get(token_id)
        if data is None:
            piece = self.id_to_token(token_id)
            data = self._bytes[token_id] = b"" if piece is None else self._piece_rule(piece)
        return data

    def token_to_id(self, token: str) -> int | None:
        """See the protocol."""
        return self._inner.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """See the protocol."""
        return self._inner.id_to_token(token_id) if token_id >= 0 else None

    def to_json(self) -> str:
        """The content of a `tokenizer.json` that holds this vocabulary and its rules."""
        return self._inner.to_str()


def detects(checkpoint: Checkpoint) -> bool:
    """Whether `tokenizer.json` is in the checkpoint's folder."""
    return (checkpoint.folder / FILE).is_file()


def load(checkpoint: Checkpoint) -> HuggingFaceTokenizer:
    """Reads it, with the files beside it."""
    file = checkpoint.folder / FILE
    data = file.read_bytes()
    try:
        inner = tokenizers.Tokenizer.from_buffer(data)
        decoder = json.loads(data).get("decoder")
    except Exception as error:  # the library raises plain Exception
        raise TokenizerNotFound(f"{file}: {error}") from error
    piece_rule, strips_leading_space = _decoding_of(decoder, str(file))
    settings = read_settings(checkpoint)
    return HuggingFaceTokenizer(
        inner,
        piece_rule=piece_rule,
        strips_leading_space=strips_leading_space,
        bos_token_id=settings.bos_token_id(inner.token_to_id),
        eos_token_ids=settings.eos_token_ids(inner.token_to_id),
        chat_template=settings.chat_template,
        fingerprint=hashlib.sha256(data).hexdigest(),
    )


def byte_level_piece(piece: str) -> bytes:
    """GPT-2's writing: every byte is one printable character."""
    try:
        return bytes(_BYTE_OF[character] for character in piece)
    except KeyError:  # not written that way, so it stands for itself
        return piece.encode()


def sentencepiece_piece(piece: str) -> bytes:
    """SentencePiece's writing: a low line for a space, and <0x0A> for single bytes."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes.fromhex(piece[3:5])
    return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def _word_piece(piece: str) -> bytes:
    """No decoder: words, which are joined by spaces."""
    return b" " + piece.encode()


def _decoding_of(decoder: dict[str, Any] | None, source: str) -> tuple[PieceRule, bool]:
    """Bytes of a token, and whether a leading space goes, as the decoder's description has it."""
    if decoder is None:
        return _word_piece, True
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        return byte_level_piece, False
    if kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        strips = any(step["type"] == "Strip" and step.get("start", 0) for step in steps)
        for step in steps:
            if step["type"] == "Metaspace":
                strips |= step.get("prepend_scheme", "always") != "never"
        return sentencepiece_piece, strips
    raise TokenizerNotFound(f"{source}: decoder {' + '.join(sorted(kinds))} is not supported")


def _byte_characters() -> dict[str, int]:
    """Printable Latin-1 characters are their own byte; the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF = _byte_characters()
