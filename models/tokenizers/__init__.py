"""Text <-> token ids. `load_tokenizer` takes what the checkpoint brings.

Adding a kind of tokenizer: a module (or object) with `detects` and `load`, and one row in
`TOKENIZERS`.
"""

from collections.abc import Iterable
from typing import Protocol

from kvjax.errors import TokenizerNotFound
from kvjax.models.checkpoint import Checkpoint
from kvjax.models.tokenizers import gguf, huggingface, sentencepiece
from kvjax.models.tokenizers.decoding import IncrementalDecoder as IncrementalDecoder


class Tokenizer(Protocol):
    """A vocabulary with its rules. Immutable, and safe to use from several threads."""

    @property
    def vocab_size(self) -> int:
        """Highest id + 1, added tokens included; a model may have more rows than that."""
        ...

    @property
    def bos_token_id(self) -> int | None:
        """What begins a sequence, if anything does."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """What ends a generation: the tokenizer's own end first, then the model's others."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Control tokens, which `skip_special_tokens` leaves out of text."""
        ...

    @property
    def chat_template(self) -> str | None:
        """Jinja source, for `kvjax.models.chat.render_chat`."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of vocabulary and rules: equal ones give equal ids for equal text."""
        ...

    @property
    def strips_leading_space(self) -> bool:
        """Whether encoding adds a space in front, which decoding therefore removes."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; special tokens written out in it become their ids.

        `add_special_tokens` adds what the model wants around a text (mostly a beginning). Text
        from a chat template has it already: pass False for that.
        """
        ...

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`: bytes that are no UTF-8 become U+FFFD, unknown ids become nothing."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What the token contributes to the text: UTF-8, or a part of a character."""
        ...

    def token_to_id(self, token: str) -> int | None:
        """Id of a token as the vocabulary writes it."""
        ...

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it."""
        ...


class TokenizerKind(Protocol):
    """One way in which a checkpoint brings its tokenizer."""

    def detects(self, checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint brings one of this kind; looks at names only."""
        ...

    def load(self, checkpoint: Checkpoint) -> Tokenizer:
        """Raises `TokenizerNotFound` if it is there but cannot be read, with the reason."""
        ...


# In order of preference.
TOKENIZERS: dict[str, TokenizerKind] = {
    "gguf": gguf,
    "huggingface": huggingface,
    "sentencepiece": sentencepiece,
}


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer. Raises `TokenizerNotFound` if it brings none that can be read."""
    for kind in TOKENIZERS.values():
        if kind.detects(checkpoint):
            return kind.load(checkpoint)
    raise TokenizerNotFound(
        f"{checkpoint.path}: no vocabulary inside, and neither {huggingface.FILE} nor "
        f"{sentencepiece.FILE} in {checkpoint.folder}"
    )
