"""`kvjax reuse report` from a file of prompts to a page."""

import json
import re
from pathlib import Path

import pytest

from kvjax.cli import main
from tests.tiny_checkpoint import write_tiny_checkpoint

PROMPTS = [
    {"prompt": ["Read: ", {"chunk": "the keeper <b>is</b> Farid. "}, {"chunk": "4817! "}, "Who?"]},
    {"prompt": "no chunks"},
]
SMALL = ["-q", "--dtype", "float32", "--max-model-len", "128", "--max-num-batched-tokens", "32",
         "--max-num-seqs", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("report")
    lines = "".join(json.dumps(line) + "\n" for line in PROMPTS)
    (folder / "prompts.jsonl").write_text(lines)
    return str(write_tiny_checkpoint(folder / "model")), str(folder / "prompts.jsonl")


def test_a_measured_page_shows_the_prompt_and_deviations_of_what_was_not_run(files, tmp_path):
    page = tmp_path / "page.html"
    words = ["reuse", "report", *files, *SMALL, "--reuse", "epic:k=2", "--measure", "-o", str(page)]
    assert main(words) == 0
    text = page.read_text()
    titles = re.findall(r'title="token \d+: (\w+), KV deviation ([\d.e-]+)"', text)
    assert len(titles) == len("Read: the keeper <b>is</b> Farid. 4817! Who?")
    off = {fate: max(float(d) for f, d in titles if f == fate) for fate, _ in titles}
    assert set(off) == {"computed", "recomputed", "shifted"}
    assert off["shifted"] > 1e-6  # moved KV is another than a full prefill's
    first = [float(d) for _, d in titles[:6]]
    assert max(first) < 1e-9  # in front of all chunks there is nothing approximate
    assert "&lt;" in text
    assert "<b>is" not in text


def test_without_a_file_the_report_is_text(files, capsys):
    assert main(["reuse", "report", *files, *SMALL, "--reuse", "naive"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"shifted +34 ", shown)
    assert "the keeper" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--line", "2", "--reuse", "naive"], "marks no chunk"),
        (["--line", "9", "--reuse", "naive"], "no line 9"),
        (["--line", "0", "--reuse", "naive"], "--line must be at least 1, got 0"),
        ([], "prefix reuses no chunks"),
        (["--reuse", "naive", "--reuse", "epic"], "one --reuse, got 2"),
        (["--reuse", "naive", "-o", "nowhere/page.html"], "no folder nowhere"),
    ],
)
def test_what_cannot_be_reported_is_said(files, words, message, capsys):
    assert main(["reuse", "report", *files, *SMALL, *words]) == 2
    assert message in capsys.readouterr().err


def test_check_takes_no_file_and_report_needs_one(files, capsys):
    assert main(["reuse", "check", *files]) == 2
    assert "check has its own prompts" in capsys.readouterr().err
    assert main(["reuse", "report", files[0]]) == 2
    assert "INPUT" in capsys.readouterr().err


def test_the_example_marks_chunks():
    for line in Path("examples/chunks.jsonl").read_text().splitlines():
        assert '"chunk"' in json.dumps(json.loads(line))
