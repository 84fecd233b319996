"""Structured output on the host: a grammar, and which tokens may come next.

The grammars are llguidance's, over the model's own tokenizer. A `Matcher` follows one sequence;
its mask goes to the device before every draw (`decode.state.DecodeState.grammar`).
"""

import collections
import importlib.util
import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvjax.models.tokenizers import Tokenizer
from kvjax.request import StructuredOutputs

_KEPT = 64  # compiled grammars
# A small model that may write white space between two tokens of JSON writes nothing else any more.
_JSON = {"whitespace_pattern": r"\n? {0,16}"}


def mask_words(vocab_size: int) -> int:
    """Words of a mask: bit `t % 32` of word `t // 32` is token `t`."""
    return -(-vocab_size // 32)


class Matcher:
    """One sequence's place in its grammar. Not thread-safe: the engine's thread has it."""

    def __init__(self, inner: Any, vocab_size: int) -> None:
        self.inner = inner  # llguidance's own
        self._vocab_size = vocab_size

    def fresh(self) -> "Matcher":
        """Another one at the beginning of the same grammar, if this one is still there."""
        return Matcher(self.inner.deep_copy(), self._vocab_size)

    def mask(self) -> np.ndarray:
        """Tokens that may come next, as bits: i32[mask_words]."""
        words = np.zeros((1, mask_words(self._vocab_size)), np.int32)
        self.inner.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        return words[0]

    def accept(self, token: int) -> bool:
        """Takes the token that came; False if the grammar does not allow it."""
        return bool(self.inner.consume_token(token))

    @property
    def complete(self) -> bool:
        """Whether the text is whole and nothing can follow it but an end token."""
        return bool(self.inner.is_stopped())


class Grammars:
    """Compiles what requests ask for. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._end_ids = [token for token in end_token_ids if token < vocab_size]
        self._inner: Any = None
        self._compiled: collections.OrderedDict[StructuredOutputs, Matcher] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()

    def matcher(self, asked: StructuredOutputs) -> Matcher:
        """A matcher at the beginning. Raises `ValueError` for a grammar that cannot be."""
        with self._lock:
            found = self._compiled.get(asked)
            if found is None:
                found = self._compiled[asked] = self._compile(asked)
                if len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(asked)
            return found.fresh()

    def _compile(self, asked: StructuredOutputs) -> Matcher:
        if importlib.util.find_spec("llguidance") is None:
            raise ValueError('structured outputs need llguidance: pip install "kvjax[serve]"')
        import llguidance

        if not self._end_ids:
            raise ValueError("structured outputs need a model with an end token")
        if self._inner is None:
            vocabulary = llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size))
            self._inner = llguidance.LLTokenizer(
                vocabulary, n_vocab=self._vocab_size, eos_token=self._end_ids
            )
        grammar = _grammar(llguidance.LLMatcher, asked)
        inner = llguidance.LLMatcher(self._inner, grammar, log_level=0)
        if inner.is_error():
            raise ValueError(f"structured_outputs: {inner.get_error().strip().splitlines()[0]}")
        return Matcher(inner, self._vocab_size)


def _grammar(matcher: Any, asked: StructuredOutputs) -> str:
    """Structured outputs in llguidance's own words."""
    if asked.json is not None:
        return matcher.grammar_from_json_schema(asked.json, _JSON)
    if asked.json_object:
        return matcher.grammar_from_json_schema('{"type": "object"}', _JSON)
    if asked.regex is not None:
        return matcher.grammar_from_regex(asked.regex)
    if asked.choice is not None:
        words = " | ".join(json.dumps(word, ensure_ascii=False) for word in asked.choice)
        return matcher.grammar_from_lark(f"start: {words}")
    assert asked.grammar is not None
    return matcher.grammar_from_lark(asked.grammar)


class _Vocabulary:
    """What llguidance wants to know of a tokenizer. A control token is marked by a byte 0xFF."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted(i for i in tokenizer.special_ids if i < vocab_size)
        special = tokenizer.special_ids
        self.tokens = [
            (b"\xff" if token in special else b"") + tokenizer.token_bytes(token)
            for token in range(min(vocab_size, tokenizer.vocab_size))
        ]
        self.tokens += [b""] * (vocab_size - len(self.tokens))

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)
