import json
import re
import sys
from pathlib import Path

import jsonschema_rs
import numpy as np
import pytest

from kvjax.benchmarks import grammar
from kvjax.benchmarks.__main__ import main
from kvjax.benchmarks.grammar_cases import Case, cases
from kvjax.benchmarks.peers import grammar_worker
from tests.benchmarks.result_schema import complaints
from tests.tiny_checkpoint import write_tiny_checkpoint

WORD = Case("word", "regex", "[a-c]{3}", ("abc", "cab"), ("abd", "ab", "abca"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def task(tiny):
    tokenizer = grammar_worker.open_tokenizer(str(tiny))
    return grammar.make_task(str(tiny), tokenizer, [WORD], rows=2, threads=1)


def fits(case: Case, text: str) -> bool:
    """By another implementation than those that are measured; grammars have none here."""
    if case.kind == "json":
        return jsonschema_rs.is_valid(case.spec, json.loads(text))
    return text in case.spec if case.kind == "choice" else bool(re.fullmatch(case.spec, text))


@pytest.mark.parametrize("case", cases(4), ids=lambda case: case.name)
def test_the_texts_of_a_case_fit_or_do_not(case):
    assert len(case.fitting) == 4
    if case.kind != "grammar":
        assert all(fits(case, text) for text in case.fitting)
        assert not any(fits(case, text) for text in case.unfitting)


def test_the_worker_counts_what_is_let_through(task):
    told = grammar_worker.measure(grammar_worker.LLGuidance(task), task["cases"][0], task)
    assert (told["fitting_accepted"], told["unfitting_refused"]) == (2, 3)
    assert len(told["mask_s"]) == 2 * len(told["step_s"]) == 6


def test_a_library_that_lets_everything_or_nothing_through_is_found_out(task):
    class Open(grammar_worker.LLGuidance):
        fill_with = -1

        def fill(self, matcher, masks, row):
            masks[row] = self.fill_with

        def accept(self, matcher, token):
            return True

    class Shut(Open):
        fill_with = 0

    for library, accepted, refused in ((Open, 2, 0), (Shut, 0, 3)):
        told = grammar_worker.measure(library(task), task["cases"][0], task)
        assert (told["fitting_accepted"], told["unfitting_refused"]) == (accepted, refused)


def test_bits_are_read_from_the_words_where_masks_have_them():
    masks = np.zeros((2, 2), np.int32)
    masks[1] = (1 << 5, -(1 << 31))  # tokens 5 and 63
    assert [t for t in range(64) if grammar_worker.allows(masks, 1, t)] == [5, 63]
    assert not any(grammar_worker.allows(masks, 0, t) for t in range(64))


def test_the_command_writes_a_result_of_the_schema(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(grammar, "cases", lambda *_, **__: [WORD])
    out = tmp_path / "grammar.json"
    words = ["grammar", "--libraries=llguidance", f"--model={tiny}", "--rows=2", "--rounds=1"]
    assert main([*words, f"--out={out}"]) == 0
    record = json.loads(out.read_text())
    assert complaints(record) == []
    (row,) = record["rows"]
    assert (row["fitting_accepted"], row["unfitting_refused"]) == (2, 3)
    assert str(tmp_path) not in out.read_text()
    del row["whole_s"]
    assert complaints(record)


def test_a_library_whose_environment_is_not_there_is_named(tmp_path, capsys):
    missing = f"--peer-env=xgrammar={tmp_path}"
    words = ["grammar", "--libraries=xgrammar", f"--out={tmp_path / 'x.json'}"]
    assert main([*words, missing]) == 2
    assert "install.py xgrammar" in capsys.readouterr().err


def test_a_worker_that_fails_says_why(task):
    with pytest.raises(ValueError, match="KeyError"):
        grammar.ask(Path(sys.executable), "no-library", task)
