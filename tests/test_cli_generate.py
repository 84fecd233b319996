"""`kvjax generate`: every good line gets its record once, whatever happens to the others."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvjax import LLM, SamplingParams
from kvjax.cli import main, options
from kvjax.jsonl import RecordFile
from tests.tiny_checkpoint import write_tiny_checkpoint

FLAGS = ("--max-tokens", "4", "--seed", "3", "--quiet")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def llm(model) -> LLM:
    return LLM(model, dtype="float32", max_num_seqs=2, max_num_batched_tokens=32)


@pytest.fixture(autouse=True)
def _one_engine(monkeypatch, request):
    """Commands of these tests share one engine."""
    if "slow" not in request.keywords:
        shared = request.getfixturevalue("llm")
        monkeypatch.setattr(options, "open_llm", lambda args: shared)


def prompts(count: int) -> list[dict[str, Any]]:
    return [{"id": f"id{i}", "prompt": f"shared beginning, number {i}"} for i in range(count)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def records(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def texts(path: Path) -> dict[int, list[str]]:
    found = records(path)
    assert len({r["line"] for r in found}) == len(found), "a line has two records"
    return {r["line"]: [o["text"] for o in r["outputs"]] for r in found}


def run(*arguments: object) -> int:
    return main(["generate", *map(str, arguments)])


def test_records_hold_what_the_library_returns_in_the_order_of_the_input(tmp_path, model, llm):
    rows = prompts(20)
    rows[3] |= {"n": 2, "max_tokens": 6, "logprobs": 1}
    out = tmp_path / "out.jsonl"
    assert run(model, write(tmp_path / "in.jsonl", rows), "-o", out, "--ordered", *FLAGS) == 0
    found = records(out)
    assert [r["line"] for r in found] == list(range(1, 21))
    assert [r["id"] for r in found] == [r["id"] for r in rows]
    expected = llm.generate(
        [row["prompt"] for row in rows],
        [
            SamplingParams(seed=3, max_tokens=6, n=2, logprobs=1)
            if i == 3
            else SamplingParams(seed=3, max_tokens=4)
            for i in range(20)
        ],
    )
    for record, output in zip(found, expected, strict=True):
        assert [tuple(o["token_ids"]) for o in record["outputs"]] == [
            o.token_ids for o in output.outputs
        ]
        assert [o["text"] for o in record["outputs"]] == [o.text for o in output.outputs]
        assert record["num_prompt_tokens"] == len(output.prompt_token_ids)
        assert record["error"] is None
    assert sum(r["num_cached_tokens"] for r in found) > 0
    assert len(found[3]["outputs"][0]["logprobs"]) == len(found[3]["outputs"][0]["token_ids"])


def test_bad_lines_are_told_by_number_and_good_lines_still_run(tmp_path, model, capsys):
    rows = [
        {"prompt": "good"},
        '{"prompt": ',
        "",
        '["a list"]',
        {"promt": "misspelt"},
        {"prompt": "x", "top_p": 3, "id": 7},
        {"prompt": "x", "max_tokns": 3},
        {"prompt_token_ids": [100000]},
        {"prompt_token_ids": ["a"]},
        {"prompt": "far too long " * 100},
        {"messages": [{"content": "no role"}]},
        {"prompt": ""},
        '{"prompt": "half a pair \\ud800"}',
        "[" * 100_000,
        {"messages": [{"role": "user", "content": "good"}], "logit_bias": {"65": 2.5}},
        '{"prompt": "x", "id": NaN}',
        {"messages": []},
    ]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    source.write_bytes(source.read_bytes() + b'{"prompt": "\xff"}\n')
    assert run(model, source, "-o", out, *FLAGS) == 1
    found = {r["line"]: r for r in records(out)}
    assert set(found) == set(range(1, 19)) - {3}
    assert {n for n, r in found.items() if r["error"] is None} == {1, 15}
    assert found[6]["id"] == 7
    told = capsys.readouterr().err
    for line, words in {
        2: "not JSON", 5: "promt", 6: "top_p", 7: "meant 'max_tokens'", 8: "100000",
        10: "1300 tokens", 12: "empty", 16: "not JSON: NaN", 17: "messages is empty",
        18: "not UTF-8 at byte",
    }.items():  # fmt: skip
        assert f"line {line}: " in told
        assert words in found[line]["error"]["message"]


def test_an_interrupted_run_continues_and_loses_or_repeats_nothing(tmp_path, model, monkeypatch):
    source = write(tmp_path / "in.jsonl", [*prompts(12), "{broken"])
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run(model, source, "-o", whole, *FLAGS) == 1
    plain_write = RecordFile.write
    calls = iter(range(100))

    def interrupted_write(self, fields):
        if next(calls) == 5:
            raise KeyboardInterrupt
        plain_write(self, fields)

    with monkeypatch.context() as patch:
        patch.setattr(RecordFile, "write", interrupted_write)
        assert run(model, source, "-o", out, *FLAGS) == 130
    assert len(records(out)) == 5
    out.write_bytes(out.read_bytes() + b'{"id":"id9","line":10,"sha')  # killed in mid-write
    before = records(out) if out.read_bytes().endswith(b"\n") else None
    assert before is None
    assert run(model, source, "-o", out, "--resume", *FLAGS) == 1
    assert texts(out) == texts(whole)
    size = out.stat().st_size
    assert run(model, source, "-o", out, "--resume", *FLAGS) == 1, "one of its lines had failed"
    assert out.stat().st_size == size


def test_results_are_never_mixed_with_those_of_another_input(tmp_path, model, capsys):
    source, out = write(tmp_path / "in.jsonl", prompts(3)), tmp_path / "out.jsonl"
    assert run(model, source, "-o", out, *FLAGS) == 0
    write(source, [{"prompt": "changed"}, *prompts(3)[1:]])
    before = out.read_bytes()
    assert run(model, source, "-o", out, "--resume", *FLAGS) == 2
    assert "the input has changed" in capsys.readouterr().err
    write(source, prompts(2))
    assert run(model, source, "-o", out, "--resume", *FLAGS) == 2
    assert run(model, source, "-o", out, *FLAGS) == 2
    assert "--resume continues it" in capsys.readouterr().err
    assert run(model, source, "-o", source, "--overwrite", *FLAGS) == 2
    assert out.read_bytes() == before
    assert run(model, source, "-o", out, "--overwrite", *FLAGS) == 0
    assert len(records(out)) == 2
    with RecordFile(out, resume=True):
        assert run(model, source, "-o", out, "--resume", *FLAGS) == 2
    assert "another run" in capsys.readouterr().err


def test_a_run_that_cannot_start_leaves_the_output_as_it_was(tmp_path, model, monkeypatch):
    source, out = write(tmp_path / "in.jsonl", prompts(2)), tmp_path / "out.jsonl"

    def no_engine(args):
        raise ValueError("no engine")

    monkeypatch.setattr(options, "open_llm", no_engine)
    assert run(model, source, "-o", out, *FLAGS) == 2
    assert not out.exists()
    out.write_text("precious\n")
    assert run(model, source, "-o", out, "--overwrite", *FLAGS) == 2
    assert run(model, source, "-o", out, "--resume", *FLAGS) == 2
    assert out.read_text() == "precious\n"


def test_text_from_standard_input_is_one_prompt_a_line(model, monkeypatch, capfdbinary):
    stdin = io.TextIOWrapper(io.BytesIO(b"one\r\n\n  two\nthree"))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run(model, "--ordered", *FLAGS) == 0
    found = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert [(r["line"], r["num_prompt_tokens"]) for r in found] == [(1, 3), (3, 5), (4, 5)]


@pytest.mark.parametrize("ordered", [False, True])
def test_a_stream_of_any_length_is_read_no_further_than_its_window(llm, ordered):
    taken = given = 0

    def jobs():
        nonlocal taken
        for i in range(40):
            taken += 1
            assert taken - given <= 5
            long = i == 3
            yield i, "p" if i % 7 else "", SamplingParams(max_tokens=30 if long else 2, seed=i)

    keys = []
    for key, result in llm.generate_stream(jobs(), ordered=ordered, window=5):
        given += 1
        keys.append(key)
        assert isinstance(result, ValueError) == (key % 7 == 0)
    assert sorted(keys) == list(range(40))
    assert (keys == sorted(keys)) == ordered
    assert not llm.engine.has_work


def test_leaving_a_stream_frees_everything(llm):
    stream = llm.generate_stream((i, "word", SamplingParams(max_tokens=50)) for i in range(9))
    with contextlib.closing(stream):
        next(stream)
    while llm.engine.has_work:
        llm.engine.step()
    llm.engine.check_integrity()


@pytest.mark.slow
def test_a_killed_process_leaves_whole_records_and_is_continued(tmp_path, model):
    source = write(tmp_path / "in.jsonl", prompts(400))
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "kvjax.cli", "generate", str(model), str(source)]
    command += ["-o", str(out), "--max-num-seqs", "2", "--max-num-batched-tokens", "32", *FLAGS]
    environment = {**os.environ, "KVJAX_CACHE_DIR": str(tmp_path / "cache")}
    with subprocess.Popen(command, env=environment) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (out.exists() and out.stat().st_size > 3000):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    done = len(out.read_bytes().splitlines())
    assert 0 < done < 400
    assert subprocess.run([*command, "--resume"], env=environment, check=False).returncode == 0
    assert set(texts(out)) == set(range(1, 401))
