import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvjax.benchmarks import serve_peers
from kvjax.benchmarks.__main__ import main
from kvjax.benchmarks.client import Record
from kvjax.benchmarks.peers import TARGETS, install
from kvjax.benchmarks.serve_peers import WorkerServed, as_ids
from kvjax.benchmarks.serve_rounds import Plan, Side, run_rounds
from kvjax.benchmarks.workers import Target, UnequalWork, Worker, WorkerFailed
from kvjax.benchmarks.workloads import Part, Request
from tests.benchmarks.result_schema import complaints
from tests.tiny_checkpoint import write_tiny_checkpoint

BARE = Path(sys.executable)  # has no peer installed
FAKE = Path(__file__).with_name("fake_target.py")
REQUEST = Request((Part(token_ids=(1, 2, 3, 4)),), 3)


@pytest.fixture
def open_side():
    """Opens sides over the fake target; they are ended afterwards."""
    workers = []

    def side(**options):
        name = options.pop("name", "fake")
        target = Target(name=name, python=Path(sys.executable), file=FAKE, options=options)
        workers.append(worker := Worker(target))
        worker.load(streams=True)
        served = WorkerServed(worker, worker.ask("listen")["port"])
        memory = lambda: {"peak_rss_mib": worker.peak_rss_mib()}  # noqa: E731
        return Side(served, memory=memory, turn=worker.running)

    yield side
    for worker in workers:
        worker.close()


def run(sides, rounds=2, requests=(REQUEST,) * 3, **how):
    plan = Plan(rounds=[requests] * rounds, times=[[0.0] * len(requests)] * rounds)
    asyncio.run(run_rounds(sides, plan, lambda: None, **how))
    return [side.result(plan) if side.rounds else {} for side in sides]


def test_every_side_gets_the_same_requests_and_its_own_times(open_side):
    sides = [open_side(per_step=0.03), open_side(per_step=0.06)]
    fast, slow = run(sides)
    assert (fast["completed"], slow["completed"]) == (6, 6)
    assert fast["total_output_tokens"] == slow["total_output_tokens"] == 18
    assert 30 <= fast["median_itl_ms"] < 45
    assert 60 <= slow["median_itl_ms"] < 75
    assert fast["peak_rss_mib"] > 1
    assert (fast["total_cached_tokens"], fast["cache_hit_rate"]) == (12, 0.5)
    assert len(slow["rounds"]) == 2


def test_a_target_that_streams_synchronously_runs_one_request_at_a_time(open_side):
    (found,) = run([open_side(per_prompt_token=0.02)], rounds=1)
    first, second, third = sorted(found["ttfts"])
    assert first >= 0.08
    assert min(second - first, third - second) >= 0.075  # whoever waits, waits for a whole one


def test_unequal_work_is_refused_and_ends_that_side_alone(open_side):
    def check(side, requests):
        try:
            serve_peers.require_equal_work(side.rounds[-1][0], requests, side.target.name)
        except UnequalWork as error:
            side.failure = str(error)

    sides = [open_side(name="whole"), open_side(name="short", short_by=1)]
    run(sides, check=check)
    assert sides[0].failure == ""
    assert sides[1].failure == "short: 3 new tokens asked for, got 2"
    assert [len(side.rounds) for side in sides] == [2, 1]


def test_another_prompt_than_was_sent_is_unequal_work():
    quoting = Request((Part(token_ids=(1, 2)), Part(output_of=0)), 3)
    answers = [Record(input_len=4, output_len=3), Record(input_len=5, output_len=3)]
    serve_peers.require_equal_work(answers, [REQUEST, quoting], "fake")
    answers[1].input_len = 4
    with pytest.raises(UnequalWork, match="fake: a prompt of 5 tokens was sent, 4 ran"):
        serve_peers.require_equal_work(answers, [REQUEST, quoting], "fake")


def test_a_side_that_dies_fails_alone_and_the_others_go_on(open_side):
    failed = []

    def check(side, requests):
        if side.failure:
            failed.append(side.target.name)

    sides = [open_side(name="lives"), open_side(name="dies")]
    sides[1].target.worker._kill()
    found = run(sides, check=check)
    assert found[0]["completed"] == 6
    assert failed == ["dies"]
    assert "the worker has ended" in sides[1].failure


def test_an_environment_without_the_peer_says_what_is_missing():
    peer = TARGETS["llamacpp"]
    options = {"model": "m", "dtype": "float32", "threads": 1}
    target = Target(name="llamacpp", python=BARE, file=peer.file, options=options)
    missing = pytest.raises(WorkerFailed, match="No module named 'llama_cpp'")
    with Worker(target) as worker, missing:
        worker.load(streams=True)


def test_a_peer_that_does_not_install_says_so_in_one_line(tmp_path):
    script = Path(install.__file__)
    words = [sys.executable, script, "llamacpp", tmp_path / "env", "--python", "/no/such/python"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"llamacpp was not installed in {tmp_path}/env: ")
    assert "Traceback" not in done.stderr


def test_same_outputs_are_counted_over_common_rounds(open_side):
    sides = [open_side(), open_side(), open_side(short_by=1)]
    run(sides)
    assert serve_peers.same_outputs(sides[0], sides[1]) == 1.0
    assert serve_peers.same_outputs(sides[0], sides[2]) == 0.0


def test_an_error_within_a_stream_is_the_request_s(open_side):
    (found,) = run([open_side(fail_on_new=1)], rounds=1)
    assert found["failed"] == 3
    assert "RuntimeError: this token breaks" in found["errors"][0]


def test_text_becomes_ids_for_all_alike():
    (request,) = as_ids([Request((Part("ab"), Part(output_of=0)), 3)], lambda text: [7, 8])
    assert request.parts == (Part(token_ids=(7, 8)), Part(output_of=0))
    with pytest.raises(ValueError, match="one completion per prompt, got n=4"):
        serve_peers.require_single([Request((Part("ab"),), 3, n=4)])


def test_a_peer_needs_weights_that_others_can_read(tmp_path, capsys):
    model = write_tiny_checkpoint(tmp_path / "tiny")
    words = ["serve", "--peer=llamacpp", f"--model={model}", f"--result-dir={tmp_path}/out"]
    assert main([*words, "--num-prompts=2"]) == 2
    assert "--peer needs a GGUF file" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.model
def test_a_peer_that_is_not_installed_is_a_failure_beside_kvjax_s_result(tmp_path, monkeypatch):
    words = ["serve", "--peer=vllm", f"--peer-env=vllm={tmp_path}/gone", "--quick", "--rounds=1",
             f"--result-dir={tmp_path}", "--result-filename=r.json"]  # fmt: skip
    assert main(words) == 1
    record = json.loads((tmp_path / "r.json").read_text())
    assert complaints(record) == []
    assert record["completed"] == 12
    assert record["failures"][0]["target"] == "vllm"
    assert "no environment at" in record["failures"][0]["error"]
