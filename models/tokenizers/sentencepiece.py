"""`tokenizer.model`, run by the `sentencepiece` library as Llama 2 and Mistral want it.

That is: a beginning token first, special tokens cut out of the text before the library sees it, and
a space in front of every text (`legacy`), or of the first one only.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import sentencepiece

from kvjax.errors import TokenizerNotFound
from kvjax.models.checkpoint import Checkpoint
from kvjax.models.tokenizers.decoding import decode
from kvjax.models.tokenizers.folder import Settings, content, read_json, read_settings
from kvjax.models.tokenizers.huggingface import sentencepiece_piece

FILE = "tokenizer.model"

# A model is a protobuf message, and of a field that comes twice the last one counts. This is
# normalizer_spec (3) with add_dummy_prefix (3) = false.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer:
    """See `kvjax.models.tokenizers.Tokenizer`."""

    def __init__(self, model: bytes, added: dict[str, dict[str, Any]], settings: Settings) -> None:
        """`added`: text -> table with "id" and maybe "special", "lstrip", "rstrip"."""
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._bare = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
        config = settings.tokenizer_config
        self._legacy = config.get("legacy", True)
        self._adds_bos = config.get("add_bos_token", True)
        self._adds_eos = config.get("add_eos_token", False)
        self._num_pieces = self._processor.get_piece_size()
        control = [
            i
            for i in range(self._num_pieces)
            if self._processor.is_control(i) or self._processor.is_unknown(i)
        ]
        tokens = {self._processor.id_to_piece(i): {"id": i, "special": True} for i in control}
        tokens |= added
        self._ids = {text: token["id"] for text, token in tokens.items()}
        self._texts = {token["id"]: text for text, token in tokens.items()}
        self._splitter = re.compile(
            "|".join(_pattern(text, tokens[text]) for text in sorted(tokens, key=len, reverse=True))
        )
        self.special_ids = frozenset(t["id"] for t in tokens.values() if t.get("special"))
        self.vocab_size = max(self._num_pieces, *(i + 1 for i in self._texts))
        bos = self._processor.bos_id()
        self.bos_token_id = settings.bos_token_id(self.token_to_id)
        if self.bos_token_id is None and "bos_token" not in config and bos >= 0:
            self.bos_token_id = bos
        eos = self._processor.eos_id()
        self.eos_token_ids = settings.eos_token_ids(self.token_to_id) or (
            (eos,) if eos >= 0 else ()
        )
        self.chat_template = settings.chat_template
        self.strips_leading_space = self._processor.normalize("a") != "a"
        rules = repr((sorted(self._ids.items()), self._legacy, self._adds_bos, self._adds_eos))
        self.fingerprint = hashlib.sha256(model + rules.encode()).hexdigest()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """See the protocol."""
        ids: list[int] = []
        if add_special_tokens and self._adds_bos and self.bos_token_id is not None:
            ids.append(self.bos_token_id)
        for position, part in self._parts(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                processor = self._processor if self._legacy or position == 0 else self._bare
                ids += processor.encode(part)
        if add_special_tokens and self._adds_eos and self.eos_token_ids:
            ids.append(self.eos_token_ids[0])
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """See the protocol."""
        return decode(self, ids, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """See the protocol."""
        if token_id in self._texts:
            return self._texts[token_id].encode()
        if not 0 <= token_id < self._num_pieces:
            return b""
        return sentencepiece_piece(self._processor.id_to_piece(token_id))

    def token_to_id(self, token: str) -> int | None:
        """See the protocol."""
        if token in self._ids:
            return self._ids[token]
        token_id = self._processor.piece_to_id(token)
        return None if self._processor.is_unknown(token_id) else token_id

    def id_to_token(self, token_id: int) -> str | None:
        """See the protocol."""
        if token_id in self._texts:
            return self._texts[token_id]
        known = 0 <= token_id < self._num_pieces
        return self._processor.id_to_piece(token_id) if known else None

    def _parts(self, text: str) -> Iterator[tuple[int, str | int]]:
        """Texts between added tokens, and the ids of those, each with where it starts."""
        start = 0
        for match in self._splitter.finditer(text):
            if match.start() > start:
                yield start, text[start : match.start()]
            found = match.group()
            yield match.start(), self._ids[found if found in self._ids else found.strip()]
            start = match.end()
        if start < len(text):
            yield start, text[start:]


def detects(checkpoint: Checkpoint) -> bool:
    """Whether `tokenizer.model` is in the checkpoint's folder."""
    return (checkpoint.folder / FILE).is_file()


def load(checkpoint: Checkpoint) -> SentencePieceTokenizer:
    """Reads it, with the files beside it."""
    file = checkpoint.folder / FILE
    settings = read_settings(checkpoint)
    added = {text: {"id": i} for text, i in read_json(file.with_name("added_tokens.json")).items()}
    for token_id, token in settings.tokenizer_config.get("added_tokens_decoder", {}).items():
        added[str(content(token))] = {**token, "id": int(token_id)}
    try:
        return SentencePieceTokenizer(file.read_bytes(), added, settings)
    except RuntimeError as error:  # from the library, for what is not a model
        raise TokenizerNotFound(f"{file}: not a SentencePiece model ({error})") from error


def _pattern(text: str, token: dict[str, Any]) -> str:
    """Regular expression of an added token, with the white space that it swallows."""
    left = r"\s*" if token.get("lstrip") else ""
    right = r"\s*" if token.get("rstrip") else ""
    return left + re.escape(text) + right
