"""Prompts of the engine benchmark: Python's reference text as token ids of the default model."""

from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics


def text() -> str:
    """112,000 tokens of technical prose that ships with every Python (its wording is Python's)."""
    return "\n".join(topics[name] for name in sorted(topics))


def tokenise(gguf: Path) -> list[int]:
    """`text()` as the token ids of a GGUF whose tokenizer is byte-level BPE with single digits."""
    from gguf import GGUFReader
    from tokenizers import Tokenizer, models, pre_tokenizers

    reader = GGUFReader(gguf)

    def field(key: str):
        found = reader.get_field(key)
        if found is None:
            raise ValueError(f"the GGUF has no {key}")
        return found.contents()

    if field("tokenizer.ggml.pre") != "smollm":
        raise ValueError(f"expected the smollm pre-tokenizer, got {field('tokenizer.ggml.pre')!r}")
    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer.encode(text()).ids


class TokenStream:
    """Cuts consecutive, never repeated prompts out of one list of token ids."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = ids
        self._next = 0

    def take(self, num_tokens: int) -> list[int]:
        """The next `num_tokens` ids; raises ValueError at the end: a repeat would hit caches."""
        start, stop = self._next, self._next + num_tokens
        if stop > len(self._ids):
            raise ValueError(
                f"the text has {len(self._ids)} tokens, {stop} wanted: ask for fewer rounds"
            )
        self._next = stop
        return list(self._ids[start:stop])
