"""The vocabulary inside a GGUF file, turned into a tokenizer of the `tokenizers` library."""

import enum
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from kvjax.errors import TokenizerNotFound
from kvjax.models.checkpoint import Checkpoint
from kvjax.models.checkpoint.gguf import GGUFCheckpoint
from kvjax.models.checkpoint.gguf_config import eos_token_ids
from kvjax.models.tokenizers.huggingface import (
    HuggingFaceTokenizer,
    PieceRule,
    byte_level_piece,
    sentencepiece_piece,
)

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's


class _Type(enum.IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# How the words that byte pairs are merged in were cut: regular expressions, one after the other.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SIGNS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_LLAMA3 = rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|\p{{N}}|{_SIGNS}|{_SPACES}"
_TEKKEN = rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_SIGNS_SLASH}|{_SPACES}"
_GPT4O = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|"
    rf"\p{{N}}{{1,3}}|{_SIGNS_SLASH}|{_SPACES}"
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2.removesuffix(r"|\s+"), r"\p{N}+", r"[0-9][0-9][0-9]")

# tokenizer.ggml.pre -> expressions
_WORDS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama-v3", "llama3", "falcon3", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
    "gpt-4o": (_GPT4O,),
}
# Those where a word that is a token is not put together from parts, and a beginning is the default.
_WHOLE_WORDS = {"llama-bpe", "llama-v3", "llama3", "falcon3", "tekken"}


def detects(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is a GGUF file with a vocabulary."""
    return isinstance(checkpoint, GGUFCheckpoint) and (
        "tokenizer.ggml.tokens" in checkpoint.metadata
    )


def load(checkpoint: Checkpoint) -> HuggingFaceTokenizer:
    """Builds it. A vocabulary of an unknown kind is refused by its name."""
    assert isinstance(checkpoint, GGUFCheckpoint), "detects() said so"
    return build(checkpoint.metadata, str(checkpoint.path))


def build(metadata: Mapping[str, Any], source: str) -> HuggingFaceTokenizer:
    """The tokenizer of a file's metadata; `source` is for error messages."""
    values = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    values.setdefault("token_type", [_Type.NORMAL] * len(values["tokens"]))
    kind = values.get("model")
    piece_rule: PieceRule
    if kind == "gpt2":
        inner, piece_rule = _byte_level(values, source), byte_level_piece
        adds_bos, strips = values.get("pre") in _WHOLE_WORDS, False
    elif kind == "llama":
        inner, piece_rule = _sentencepiece(values, source), sentencepiece_piece
        adds_bos, strips = True, values.get("add_space_prefix", True)
    else:
        raise TokenizerNotFound(f"{source}: vocabulary of kind {kind!r} is not supported")
    bos, ends = values.get("bos_token_id"), eos_token_ids(metadata)
    front = [bos] if bos is not None and values.get("add_bos_token", adds_bos) else []
    back = ends[:1] if values.get("add_eos_token", False) else []
    if front or back:
        inner.post_processor = _around(front, back, values["tokens"])
    identity = json.dumps([strips, front, back, values], sort_keys=True)
    return HuggingFaceTokenizer(
        inner,
        piece_rule=piece_rule,
        strips_leading_space=strips,
        bos_token_id=bos,
        eos_token_ids=tuple(ends),
        chat_template=metadata.get("tokenizer.chat_template"),
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
    )


def _byte_level(values: Mapping[str, Any], source: str) -> tokenizers.Tokenizer:
    """GPT-2's byte pairs, with the words cut as `pre` names it."""
    pre = values.get("pre", "default")
    if pre not in _WORDS:
        raise TokenizerNotFound(f"{source}: pre-tokenizer {pre!r} is not known")
    if "merges" not in values:
        raise TokenizerNotFound(f"{source}: a vocabulary of byte pairs without merges")
    merges = [_pair(merge) for merge in values["merges"]]
    inner = _bpe(values, merges, source, ignore_merges=pre in _WHOLE_WORDS)
    splits = [pre_tokenizers.Split(Regex(words), "isolated") for words in _WORDS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    inner.decoder = decoders.ByteLevel()
    _add_tokens(inner, values, normalized=False)
    return inner


def _sentencepiece(values: Mapping[str, Any], source: str) -> tokenizers.Tokenizer:
    """SentencePiece's byte pairs: no words, the pair with the highest score is merged first."""
    tokens, types = values["tokens"], values["token_type"]
    inner = _bpe(
        values,
        _merges_by_score(tokens, values.get("scores", [0.0] * len(tokens)), types),
        source,
        byte_fallback=_Type.BYTE in types,
        unk_token=tokens[values.get("unknown_token_id", 0)],
        fuse_unk=True,
    )
    prefix = values.get("add_space_prefix", True)
    steps = [normalizers.Prepend(_SPACE)] if prefix else []
    inner.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    # Runs of spaces that are tokens (Gemma) are found after spaces were written as low lines.
    _add_tokens(inner, values, normalized=not prefix)
    return inner


def _bpe(
    values: Mapping[str, Any], merges: list[tuple[str, str]], source: str, **options: Any
) -> tokenizers.Tokenizer:
    vocabulary = {token: i for i, token in enumerate(values["tokens"])}
    try:
        return tokenizers.Tokenizer(models.BPE(vocabulary, merges, **options))
    except Exception as error:  # the library raises plain Exception
        raise TokenizerNotFound(f"{source}: {error}") from error


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge[1:].partition(" ")  # a part may begin with a space
    return merge[0] + left, right


def _merges_by_score(
    tokens: list[str], scores: list[float], types: list[int]
) -> list[tuple[str, str]]:
    """All pairs of tokens that make up another one, in the order in which they are merged.

    SentencePiece merges the best score first and, of equal ones, the leftmost. Scores are equal for
    runs of spaces (Llama 2, Mistral), where leftmost amounts to: longest left part first.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    ranked = []
    for i, token in enumerate(tokens):
        if types[i] != _Type.NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[i], -cut, left, right))
    ranked.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in ranked]


def _add_tokens(inner: tokenizers.Tokenizer, values: Mapping[str, Any], normalized: bool) -> None:
    """Declares the tokens that are cut out of the text before anything else happens to it."""
    special, plain = [], []
    for token, kind in zip(values["tokens"], values["token_type"], strict=True):
        if kind in (_Type.CONTROL, _Type.UNKNOWN):
            special.append(AddedToken(token, special=True, normalized=False))
        elif kind == _Type.USER_DEFINED:
            plain.append(AddedToken(token, special=False, normalized=normalized))
    inner.add_special_tokens(special)
    inner.add_tokens(plain)


def _around(front: list[int], back: list[int], tokens: list[str]) -> processors.TemplateProcessing:
    """What `add_special_tokens` puts before and after a text."""
    template = [*(tokens[i] for i in front), "$A", *(tokens[i] for i in back)]
    used = [(tokens[i], i) for i in {*front, *back}]
    return processors.TemplateProcessing(single=template, special_tokens=used)
