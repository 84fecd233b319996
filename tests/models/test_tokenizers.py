"""All kinds of tokenizers: against the libraries' own answers, and one token at a time."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from kvjax.errors import TokenizerNotFound
from kvjax.models.checkpoint import open_checkpoint
from kvjax.models.tokenizers import TOKENIZERS, IncrementalDecoder, Tokenizer, load_tokenizer
from kvjax.models.tokenizers.gguf import build
from kvjax.models.tokenizers.huggingface import HuggingFaceTokenizer
from kvjax.request import SamplingParams
from kvjax.text import TextStream

CORPUS = [
    "The quick brown fox jumps over the lazy dog, twice in 2024.",
    "Keys and values are computed once, then reused everywhere.",
    "déjà vu: naïve café owners don't count 1234567 grains of rice",
    "  two leading spaces,\ttabs\nand new lines  ",
    "it's what they're after; we'll see, I'd say you've won",
] * 8
PROBES = [
    "",
    " ",
    "Hello world",
    " Hello  world ",
    "a\n  3 12",
    "naïve café, twice in 2024!",
    "emoji 🤖 and 👩‍👩‍👧, 中文字",
    "they're 1234567\n\n\tdon't",
    "unbelievable_snake_case(x=3)",
]
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


def byte_level_json(folder: Path, **config: Any) -> Path:
    """A folder with a byte-level tokenizer trained on the corpus."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    inner.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    inner.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", 0)]
    )
    inner.enable_truncation(5)
    inner.enable_padding(length=32)
    return model_folder(folder, config, {"tokenizer.json": inner.to_str()})


def model_folder(folder: Path, config: dict[str, Any], files: dict[str, str]) -> Path:
    """A folder that opens as a checkpoint, with tokenizer files in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    safetensors.numpy.save_file({"a": np.ones(1, np.float32)}, folder / "model.safetensors")
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def load(folder: Path) -> Tokenizer:
    return load_tokenizer(open_checkpoint(folder))


@pytest.fixture(scope="module")
def spm_model(tmp_path_factory) -> bytes:
    """A SentencePiece model as Llama 2 has it: byte pairs, byte fallback, identity."""
    path = tmp_path_factory.mktemp("spm") / "spm"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(path),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return path.with_suffix(".model").read_bytes()


def spm_folder(folder: Path, model: bytes, **tokenizer_config: Any) -> Path:
    model_folder(folder, {}, {"tokenizer_config.json": json.dumps(tokenizer_config)})
    (folder / "tokenizer.model").write_bytes(model)
    return folder


def spm_metadata(model: bytes) -> dict[str, Any]:
    """The same vocabulary as a GGUF file would hold it."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.get_piece_size())

    def kind(i: int) -> int:
        tests = ((processor.is_unknown, 2), (processor.is_control, 3), (processor.is_byte, 6))
        return next((kind for test, kind in tests if test(i)), 1)

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [processor.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [kind(i) for i in ids],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


@pytest.fixture(scope="module")
def every_kind(spm_model, tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("kinds")
    return {
        "tokenizer.json": load(byte_level_json(folder / "json")),
        "sentencepiece": load(spm_folder(folder / "spm", spm_model)),
        "gguf": build(spm_metadata(spm_model), "test"),
    }


KINDS = ["tokenizer.json", "sentencepiece", "gguf"]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(text=TEXT)
def test_decoding_undoes_encoding(every_kind, kind, text):
    tokenizer = every_kind[kind]
    text = text.replace("\N{LOWER ONE EIGHTH BLOCK}", "_")  # which SentencePiece takes for a space
    assert tokenizer.decode(tokenizer.encode(text)) == text


def check_incremental(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    decoder = IncrementalDecoder(tokenizer, skip)
    text = ""
    for count, token_id in enumerate(ids, 1):
        text += decoder.push(token_id)
        held_back = tokenizer.decode(ids[:count], skip).removeprefix(text)
        assert not held_back.strip("\N{REPLACEMENT CHARACTER}"), "a whole character held back"
        assert len(held_back) <= 3, "more than an incomplete character held back"
    assert text + decoder.flush() == tokenizer.decode(ids, skip)
    assert decoder.flush() == ""


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(ids=st.lists(st.integers(0, 420), max_size=30), skip=st.booleans())
def test_pieces_concatenate_to_the_whole(every_kind, kind, ids, skip):
    check_incremental(every_kind[kind], ids, skip)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(prompt=TEXT, ids=st.lists(st.integers(0, 420), max_size=12), skip=st.booleans())
@example(prompt="The sky is", ids=[], skip=True)
def test_a_prompt_and_the_text_that_continues_it_concatenate(every_kind, kind, prompt, ids, skip):
    """With a vocabulary like Llama 2's, too, whose decoder drops the first space of a text."""
    tokenizer = every_kind[kind]
    prompt_ids = tokenizer.encode(prompt)
    ids = ids or tokenizer.encode("blue", add_special_tokens=False)
    stream = TextStream(tokenizer, SamplingParams(skip_special_tokens=skip), prompt_ids=prompt_ids)
    for place, token_id in enumerate(ids, start=1):
        stream.push(token_id, last=place == len(ids))
    whole = tokenizer.decode([*prompt_ids, *ids], skip)
    assert tokenizer.decode(prompt_ids, skip) + stream.text == whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_comes_when_its_last_byte_does(every_kind, kind):
    tokenizer = every_kind[kind]
    ids = tokenizer.encode("x🤖", add_special_tokens=False)
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(token_id) for token_id in ids]
    assert len(pieces) > 4
    assert pieces[-1] == "🤖"
    assert "".join(pieces[:-1]) == "x"
    assert decoder.flush() == ""
    cut_off = IncrementalDecoder(tokenizer)
    for token_id in ids[:-1]:
        cut_off.push(token_id)
    assert cut_off.flush() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("kind", KINDS)
def test_ids_beyond_the_vocabulary_are_nothing(every_kind, kind):
    tokenizer = every_kind[kind]
    assert tokenizer.decode([tokenizer.vocab_size, 10**6]) == ""
    assert tokenizer.id_to_token(tokenizer.vocab_size) is None
    assert tokenizer.id_to_token(tokenizer.vocab_size - 1) is not None
    assert tokenizer.token_to_id("no such token") is None
    token = tokenizer.id_to_token(300)
    assert token is not None
    assert tokenizer.token_to_id(token) == 300


def test_a_tokenizer_json_gives_the_librarys_ids_and_text(tmp_path):
    folder = byte_level_json(tmp_path / "m")
    ours = load(folder)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.no_truncation()
    theirs.no_padding()
    for text in [*PROBES, "a<s>b</s><tool> c"]:
        for special in (False, True):
            ids = theirs.encode(text, add_special_tokens=special).ids
            assert ours.encode(text, special) == ids
            assert ours.decode(ids, special) == theirs.decode(ids, special)
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(0, ours.vocab_size, size=20).tolist()
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.special_ids == {0, 1}
    assert ours.decode([0, 400], skip_special_tokens=True) == "<tool>"


def test_ends_come_from_tokenizer_then_generation_then_model_config(tmp_path):
    folder = byte_level_json(tmp_path / "m", bos_token_id=7, eos_token_id=[9, 0])
    assert load(folder).eos_token_ids == (9, 0)
    assert load(folder).bos_token_id == 7
    (folder / "generation_config.json").write_text('{"eos_token_id": 8}')
    named = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    assert load(folder).eos_token_ids == (1, 8, 9, 0)
    assert load(folder).bos_token_id == 0
    (folder / "tokenizer_config.json").write_text('{"bos_token": null}')
    assert load(folder).bos_token_id is None
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(TokenizerNotFound, match="eos_token_id must be an id"):
        load(folder)


def test_chat_templates_are_found_wherever_they_lie(tmp_path):
    folder = byte_level_json(tmp_path / "m")
    assert load(folder).chat_template is None
    several = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert load(folder).chat_template == "d"
    (folder / "tokenizer_config.json").write_text('{"chat_template": "c"}')
    assert load(folder).chat_template == "c"
    (folder / "chat_template.jinja").write_text("j")
    assert load(folder).chat_template == "j"


def test_fingerprints_follow_the_vocabulary_not_the_folder(tmp_path, spm_model):
    first, second = (load(byte_level_json(tmp_path / name)) for name in "ab")
    assert first.fingerprint == second.fingerprint
    plain = load(spm_folder(tmp_path / "c", spm_model))
    same = load(spm_folder(tmp_path / "d", spm_model, chat_template="x"))
    other = load(spm_folder(tmp_path / "e", spm_model, add_bos_token=False))
    assert plain.fingerprint == same.fingerprint
    assert len({first.fingerprint, plain.fingerprint, other.fingerprint}) == 3


def test_a_sentencepiece_model_gives_the_librarys_ids_after_a_beginning(tmp_path, spm_model):
    ours = load(spm_folder(tmp_path / "m", spm_model))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=spm_model)
    assert (ours.bos_token_id, ours.eos_token_ids) == (1, (2,))
    assert ours.special_ids == {0, 1, 2}
    for text in PROBES:
        assert ours.encode(text) == [1, *theirs.encode(text)]
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)) == text


def test_special_tokens_are_cut_out_before_sentencepiece_sees_the_text(tmp_path, spm_model):
    added = {
        "400": {"content": "<|user|>", "special": True},
        "401": {"content": "<|tool|>", "special": False, "rstrip": True},
    }
    options = {"added_tokens_decoder": added, "add_eos_token": True}
    theirs = sentencepiece.SentencePieceProcessor(model_proto=spm_model)
    text = "one<|user|>two<|tool|>  three</s>"
    words = [theirs.encode(word) for word in ("one", "two", "three")]
    old = load(spm_folder(tmp_path / "old", spm_model, **options))
    assert old.encode(text) == [1, *words[0], 400, *words[1], 401, *words[2], 2, 2]
    assert old.vocab_size == 402
    assert old.decode(old.encode(text)) == "one two<|tool|> three"
    new = load(spm_folder(tmp_path / "new", spm_model, legacy=False, **options))
    ids = new.encode(text)
    assert ids[: len(words[0]) + 2] == [1, *words[0], 400]
    assert new.decode(ids, skip_special_tokens=False).removeprefix("<s>") == (
        " one<|user|>two<|tool|>three</s></s>"
    )
    assert new.decode(ids) == "onetwo<|tool|>three"


@settings(deadline=None, max_examples=100)
@given(
    parts=st.lists(st.sampled_from(["the ", "qu", "ick", "brown", ".", "é", "🤖", "1", "\n", "-"]))
)
def test_a_vocabulary_from_a_gguf_merges_as_sentencepiece_does(every_kind, parts):
    text = "".join(parts) + "-" * len(parts)
    assert every_kind["gguf"].encode(text) == every_kind["sentencepiece"].encode(text)


def merged_one_by_one(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's byte pairs by their definition: the best score, then the leftmost."""
    parts = list(text)
    while True:
        pairs = enumerate(a + b for a, b in itertools.pairwise(parts))
        found = [(-scores[token], place) for place, token in pairs if token in scores]
        if not found:
            return parts
        _, place = min(found)
        parts[place : place + 2] = ["".join(parts[place : place + 2])]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.sets(st.integers(2, 20), min_size=1, max_size=8).map(sorted),
    length=st.integers(1, 60),
    are_equal=st.booleans(),
)
def test_runs_of_one_character_merge_from_the_left(lengths, length, are_equal):
    scores = {"-" * n: -1e9 if are_equal else -float(n) for n in (1, *lengths)}
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", *scores],
        "tokenizer.ggml.scores": [0.0, *scores.values()],
        "tokenizer.ggml.token_type": [2] + [1] * len(scores),
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = build(metadata, "test")
    expected = [tokenizer.token_to_id(part) for part in merged_one_by_one("-" * length, scores)]
    assert tokenizer.encode("-" * length) == expected


def byte_level_metadata(folder: Path, pre: str) -> dict[str, Any]:
    described = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(described["vocab"], key=described["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, "<tool>"],
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2) + [4],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in described["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "t",
    }


def test_a_byte_level_vocabulary_from_a_gguf_equals_its_tokenizer_json(tmp_path):
    folder = byte_level_json(tmp_path / "m")
    built = build(byte_level_metadata(folder, "gpt-2"), "test")
    original = load(folder)
    for text in [*PROBES, "a<s>b</s><tool> c"]:
        ids = original.encode(text, add_special_tokens=False)
        assert built.encode(text) == ids
        assert built.decode(ids) == original.decode(ids)
    assert built.special_ids == original.special_ids
    assert built.vocab_size == original.vocab_size
    assert (built.bos_token_id, built.eos_token_ids, built.chat_template) == (0, (1,), "t")


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["a", "ĊĠ", "Ġ12345", "!?", "Ġit", "'s", "ĠIT", "'", "S"]),
        ("smollm", ["a", "ĊĠĠ", "1", "2", "3", "4", "5", "!?", "Ġit", "'s", "ĠIT", "'", "S"]),
        ("qwen2", ["a", "Ċ", "Ġ", "Ġ", "1", "2", "3", "4", "5", "!?", "Ġit", "'s", "ĠIT", "'S"]),
        ("llama-bpe", ["a", "Ċ", "Ġ", "Ġ", "123", "45", "!?", "Ġit", "'s", "ĠIT", "'S"]),
        ("gpt-4o", ["a", "Ċ", "Ġ", "Ġ", "123", "45", "!?", "Ġit's", "ĠIT'S"]),
        ("tekken", ["a", "Ċ", "Ġ", "Ġ", "1", "2", "3", "4", "5", "!?", "Ġit", "'s", "ĠIT", "'S"]),
        ("default", ["a", "ĊĠ", "Ġ", "123", "45", "!?", "Ġit", "'", "s", "ĠIT", "'", "S"]),
    ],
)
def test_words_are_cut_as_the_pre_tokenizer_is_named(tmp_path, pre, words):
    tokenizer = build(byte_level_metadata(byte_level_json(tmp_path / "m"), pre), "test")
    cutter = tokenizer._inner.pre_tokenizer
    assert cutter is not None
    assert [word for word, _ in cutter.pre_tokenize_str("a\n  12345!? it's IT'S")] == words


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokenizer.ggml.pre": "brand-new"}, "pre-tokenizer 'brand-new'"),
        ({"tokenizer.ggml.model": "bert"}, "kind 'bert'"),
        ({"tokenizer.ggml.merges": ["no pair"]}, "test"),
    ],
)
def test_an_unknown_vocabulary_is_refused_by_name(tmp_path, change, reason):
    metadata = byte_level_metadata(byte_level_json(tmp_path / "m"), "gpt-2") | change
    with pytest.raises(TokenizerNotFound, match=reason):
        build(metadata, "test")


def test_beginnings_and_ends_are_added_as_the_file_says(tmp_path):
    metadata = byte_level_metadata(byte_level_json(tmp_path / "m"), "llama-bpe")
    assert build(metadata, "test").encode("a")[0] == 0
    assert build(metadata, "test").encode("a", add_special_tokens=False)[0] != 0
    both = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    assert build(metadata | both, "test").encode("a") == [
        *build(metadata, "test").encode("a")[1:],
        1,
    ]


def test_a_checkpoint_without_a_readable_tokenizer_says_so(tmp_path):
    folder = model_folder(tmp_path / "m", {}, {})
    with pytest.raises(TokenizerNotFound, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load(folder)
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(TokenizerNotFound, match="not a SentencePiece model"):
        load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerNotFound, match=r"tokenizer\.json"):
        load(folder)
    described = json.loads(byte_level_json(folder).joinpath("tokenizer.json").read_text())
    described["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(TokenizerNotFound, match="decoder WordPiece"):
        load(folder)


def test_a_kind_from_outside_registers_through_the_table(monkeypatch, tmp_path, every_kind):
    class Theirs:
        def detects(self, checkpoint: Any) -> bool:
            return True

        def load(self, checkpoint: Any) -> Tokenizer:
            return every_kind["sentencepiece"]

    monkeypatch.setitem(TOKENIZERS, "theirs", Theirs())
    assert load(model_folder(tmp_path / "m", {}, {})) is every_kind["sentencepiece"]


# Bytes (of those in UTF-8) for which that vocabulary has no token: it drops them.
UNWRITABLE = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}


@pytest.fixture(scope="module")
def smollm2(smollm2_path) -> HuggingFaceTokenizer:
    loaded = load_tokenizer(open_checkpoint(smollm2_path))
    assert isinstance(loaded, HuggingFaceTokenizer)
    return loaded


@pytest.mark.model
def test_the_default_model_cuts_digits_one_by_one(smollm2):
    # Ids that llama.cpp gives.
    assert smollm2.encode("a\n  3 12") == [81, 11181, 35, 216, 33, 34]
    assert smollm2.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    assert smollm2.encode("<|im_start|>user\nhi") == [1, 4093, 198, 6004]
    assert (smollm2.vocab_size, smollm2.bos_token_id, smollm2.eos_token_ids) == (49152, 1, (2,))
    assert smollm2.special_ids == set(range(17))


@pytest.mark.model
@settings(deadline=None, max_examples=100)
@given(ids=st.lists(st.integers(0, 49_200), max_size=40), skip=st.booleans())
def test_the_default_models_pieces_concatenate_to_the_whole(smollm2, ids, skip):
    check_incremental(smollm2, ids, skip)
    if max(ids, default=0) < smollm2.vocab_size:
        assert smollm2.decode(ids, skip) == smollm2._inner.decode(ids, skip_special_tokens=skip)


@pytest.mark.model
@settings(deadline=None, max_examples=100)
@given(text=TEXT | st.text(st.sampled_from("👩\u200d👧🏽🤖e\u0301中 "), max_size=12))
def test_the_default_models_text_survives_token_by_token(smollm2, text):
    ids = smollm2.encode(text)
    check_incremental(smollm2, ids, skip=True)
    if not UNWRITABLE.intersection(text.encode()):
        assert smollm2.decode(ids) == text
