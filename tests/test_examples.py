"""The examples run, here on a tiny model; `make demo` runs the demo on a real one."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from kvjax import SamplingParams
from kvjax.jsonl import parse_json, read_lines
from tests.tiny_checkpoint import write_tiny_checkpoint

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


def run(name: str, model: Path, monkeypatch) -> None:
    arguments = [name, "--model", str(model), "--max-tokens", "4"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.jsonl")), ids=lambda path: path.name)
def test_every_line_of_the_prompt_files_is_right(file):
    with file.open("rb") as lines:
        jobs = [parse_json(line, SamplingParams()) for line in read_lines(lines)]
    assert len({job.id for job in jobs}) == len(jobs) > 1


def test_forks_share_the_whole_context(model, monkeypatch, capsys):
    run("fork.py", model, monkeypatch)
    shared = re.findall(r"\((\d+) of (\d+) prompt tokens shared\)", capsys.readouterr().out)
    assert len(shared) == 4
    assert len({context for context, _ in shared}) == 1
    assert all(0 < int(context) < int(length) for context, length in shared)


def test_streams_end_and_the_aborted_one_says_so(model, monkeypatch, capsys):
    run("stream.py", model, monkeypatch)
    told = dict(re.findall(r"\[(\d)\] finished: (\w+)", capsys.readouterr().out))
    assert set(told) == {"1", "2", "3"}
    assert told["3"] in ("abort", "stop", "length")  # the step that ends it may come first


def test_tables_are_encoded_once_and_reused_in_every_order(tmp_path, monkeypatch, capsys):
    run("tables.py", write_tiny_checkpoint(tmp_path, max_position_embeddings=4096), monkeypatch)
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("8 of 8 tables")
    shares = [re.findall(r"\((\d+) of (\d+) tokens reused\)", line) for line in rest]
    assert len(shares) > 1
    assert all(2 * int(reused) > int(length) for ((reused, length),) in shares)
