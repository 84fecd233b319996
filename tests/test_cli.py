"""The other commands, and what all commands have in common."""

import argparse
import dataclasses
import io
import sys
from pathlib import Path

import pytest

from kvjax import LLM, EngineConfig, SamplingParams
from kvjax.cli import COMMANDS, main, options
from kvjax.models import FAMILIES
from kvjax.pallas_kernels.dispatch import OPERATIONS
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def llm(model) -> LLM:
    return LLM(model, dtype="float32", max_num_seqs=1, max_num_batched_tokens=32)


def test_help_of_every_command_has_examples_and_exits_with_0(capsys):
    for words in ([], *([name] for name in COMMANDS), ["bench"]):
        with pytest.raises(SystemExit) as exit_:
            main([*words, "--help"])
        assert exit_.value.code == 0
        assert "usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate", "no-such-model", "-q"], "no model 'no-such-model'"),
        (["generate", "m", "--temperature", "-1"], "temperature"),
        (["generate", "m", "no/such/file"], "no/such/file"),
        (["generate", "m", "--resume"], "-o OUT.jsonl"),
        (["chat", "m", "--n", "2"], "n=2"),
        (["pull", "no-such-model"], "no-such-model"),
        (["convert", "no-such-model", "out"], "no-such-model"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line_with_status_2(words, says, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a prompt")))
    assert main(words) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert told[0].startswith("kvjax: error: ")
    assert says in told[0]


def test_wrong_words_exit_with_2(capsys):
    for words in ([], ["nonsense"], ["generate"], ["generate", "m", "--kv-cache-memory", "lots"]):
        with pytest.raises(SystemExit) as exit_:
            main(words)
        assert exit_.value.code == 2
        assert "usage" in capsys.readouterr().err


def test_a_wrong_value_of_a_flag_is_told_in_the_users_words(capsys):
    for flag, value, says in (
        ("--max-tokens", "abc", "a number of tokens or 'none', got 'abc'"),
        ("--kv-cache-memory", "lots", "a size such as 512M or 2G, got 'lots'"),
        ("--logit-bias", "5", "biases such as 5:-100,17:2.5, got '5'"),
    ):
        with pytest.raises(SystemExit):
            main(["generate", "m", flag, value])
        assert f"argument {flag}: {says}" in capsys.readouterr().err


def test_there_is_a_flag_for_every_parameter_with_the_default_of_the_library():
    parser = argparse.ArgumentParser()
    options.add_sampling(parser)
    options.add_engine(parser)
    args = parser.parse_args([])
    expected = {f.name: f.default for f in dataclasses.fields(SamplingParams)}
    expected |= {f.name: f.default for f in dataclasses.fields(EngineConfig)}
    del expected["extra_args"]  # of code from outside: in JSONL only
    assert {name: getattr(args, name) for name in expected} == expected
    assert SamplingParams(**options.sampling_of(args)) == SamplingParams()


def test_flags_are_read_as_the_library_takes_them():
    parser = argparse.ArgumentParser()
    options.add_sampling(parser)
    words = "--max-tokens none --stop a --stop b --logit-bias 5:-100,7:2.5 --stop-token-ids 1,2"
    params = SamplingParams(**options.sampling_of(parser.parse_args(words.split())))
    assert params.max_tokens is None
    assert params.stop == ("a", "b")
    assert dict(params.logit_bias or {}) == {5: -100.0, 7: 2.5}
    assert params.stop_token_ids == (1, 2)


def test_sizes_are_powers_of_1024():
    sizes = {"1000": 1000, "512M": 512 << 20, "2G": 2 << 30, "1.5GiB": 3 << 29, "64 kb": 64 << 10}
    assert {text: options.size(text) for text in sizes} == sizes
    for text in ("", "G", "-1", "1X", "1e9"):
        with pytest.raises(argparse.ArgumentTypeError):
            options.size(text)


def test_later_turns_of_a_chat_compute_only_what_is_new(model, llm, monkeypatch, capsys):
    monkeypatch.setattr(options, "open_llm", lambda args: llm)
    turns = "hello\n/nonsense\nand again\n/system be brief\nhi\n/quit\nnever said\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(turns))
    assert main(["chat", str(model), "--stats", "--max-tokens", "4", "--seed", "1"]) == 0
    err = capsys.readouterr().err
    stats = [line for line in err.splitlines() if line.startswith("[")]
    assert len(stats) == 3
    assert "no command /nonsense" in err
    reused = [int(line.split(", ")[1].split()[0]) for line in stats]
    assert reused[0] == 0
    assert reused[1] >= len("<hello>") - 1 + 4 - 1  # first question, and most of the answer
    assert reused[2] == 0, "another system prompt starts another conversation"


def test_a_turn_that_does_not_fit_is_refused_and_forgotten(model, llm, monkeypatch, capsys):
    monkeypatch.setattr(options, "open_llm", lambda args: llm)
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 600 + "\nshort\n"))
    assert main(["chat", str(model), "--max-tokens", "2"]) == 0
    captured = capsys.readouterr()
    assert "max_model_len=512" in captured.err
    assert len(captured.out.splitlines()) >= 1


def test_info_names_every_operation_and_models_every_family(capsys):
    assert main(["info"]) == 0
    told = capsys.readouterr().out
    assert "chosen" in told
    assert all(name in told for name in OPERATIONS)
    assert "compiled programs" in told
    assert "compiled kernels" in told
    assert main(["models"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in (*FAMILIES, "smollm2-135m", "orbax", "sentencepiece"))
