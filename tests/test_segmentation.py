"""Whatever the text and the tokenizer, the chunks of a document are its tokens."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from kvjax.models.tokenizers.huggingface import HuggingFaceTokenizer, byte_level_piece
from kvjax.segmentation import segment
from tests.tiny_model import LetterTokenizer

TEXT = (
    "The keeper is Farid. His code is 4817; prices are in crowns!\n\n"
    "The mill stands by the river. Who asked? Nobody.\n\nIt was late, and the café closed. "
)


@pytest.fixture(scope="module")
def merging():
    """A byte-level BPE with merges: cutting text changes its tokens."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([TEXT * 3], trainer)
    return HuggingFaceTokenizer(
        inner, piece_rule=byte_level_piece, strips_leading_space=False, bos_token_id=None,
        eos_token_ids=(), chat_template=None, fingerprint="bpe",
    )  # fmt: skip


texts = st.text(min_size=1, max_size=120) | st.lists(
    st.sampled_from(["The keeper", ". ", "\n\n", " is", " Farid", "! ", "café", "水", "🙂", " "]),
    min_size=1, max_size=40,
).map("".join)  # fmt: skip


@given(text=texts, max_tokens=st.integers(1, 20))
def test_the_chunks_of_a_document_are_its_tokens(merging, text, max_tokens):
    chunks = segment(text, merging, max_tokens)
    assert all(1 <= len(chunk.content) <= max_tokens for chunk in chunks)
    ids = [i for chunk in chunks for i in chunk.content]
    assert ids == merging.encode(text, add_special_tokens=False)
    assert b"".join(map(merging.token_bytes, ids)).decode() == text


@given(text=texts, max_tokens=st.integers(8, 20))
def test_no_cut_is_inside_a_character(merging, text, max_tokens):
    for chunk in segment(text, merging, max_tokens):
        b"".join(map(merging.token_bytes, chunk.content)).decode()


def test_cuts_are_at_paragraphs_then_sentences_then_words():
    tokenizer = LetterTokenizer()

    def cut(text: str, most: int) -> list[str]:
        return [
            tokenizer.decode(map(int, chunk.content)) for chunk in segment(text, tokenizer, most)
        ]

    assert cut("one two.\n\nthree four. five", 16) == ["one two.\n\n", "three four. five"]
    assert cut("one two. three four", 14) == ["one two. ", "three four"]
    assert cut("onetwo three", 10) == ["onetwo ", "three"]
    assert cut("abcdefgh", 3) == ["abc", "def", "gh"]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        segment("text", LetterTokenizer(), 0)
    with pytest.raises(ValueError, match="no tokens: ''"):
        segment("", LetterTokenizer(), 4)
