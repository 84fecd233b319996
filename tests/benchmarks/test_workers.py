import os
import sys
import time
from pathlib import Path

import pytest

from kvjax.benchmarks.workers import Target, TargetRefused, UnequalWork, Worker, WorkerFailed

FAKE = Path(__file__).with_name("fake_target.py")
PROMPT = list(range(10))


def fake(**options) -> Target:
    return Target(name="fake", python=Path(sys.executable), file=FAKE, options=options)


@pytest.mark.parametrize("per_step", [0.0, 0.01])
def test_seconds_and_first_token_are_the_delays_within_two_per_cent_or_three_ms(per_step):
    with Worker(fake(per_prompt_token=0.02, per_step=per_step)) as worker:
        worker.load()
        best = min((worker.generate([PROMPT], 11) for _ in range(3)), key=lambda g: g.seconds)
    assert best.first_token_s is not None
    assert best.first_token_s[0] == pytest.approx(0.2, rel=0.02, abs=0.003)
    assert best.seconds == pytest.approx(0.2 + 10 * per_step, rel=0.02, abs=0.003)


def test_a_target_that_generates_fewer_tokens_is_refused_and_stays_usable():
    with Worker(fake(short_by=1)) as worker:
        worker.load()
        with pytest.raises(UnequalWork, match=r"4 new tokens for each of 2 prompts expected.*3, 3"):
            worker.generate([PROMPT, PROMPT], 4)
        assert worker.alive


def test_an_error_inside_a_target_is_an_answer_and_not_the_end():
    with Worker(fake(fail_on_batch=True)) as worker:
        worker.load()
        with pytest.raises(WorkerFailed, match="RuntimeError: batches break here"):
            worker.generate([PROMPT, PROMPT], 1)
        assert len(worker.generate([PROMPT], 1).token_ids) == 1


def test_a_refusal_carries_its_reason():
    with Worker(fake(refuse="no int8 kernels")) as worker, pytest.raises(TargetRefused) as caught:
        worker.load()
    assert "no int8 kernels" in str(caught.value)


def test_a_worker_that_ends_is_reported_with_its_status():
    with Worker(fake(die_after=0)) as worker:
        worker.load()
        with pytest.raises(WorkerFailed, match="ended with 3"):
            worker.generate([PROMPT], 1)
        assert not worker.alive


def test_a_worker_that_hangs_is_ended_after_the_time_allowed():
    with Worker(fake(hang=True), timeout_s=1.0) as worker:
        worker.load()
        start = time.monotonic()
        with pytest.raises(WorkerFailed, match="no answer in 1 s"):
            worker.generate([PROMPT], 1)
        assert time.monotonic() - start < 3
        assert not worker.alive


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_is_paused_outside_its_block_and_its_memory_and_time_are_known():
    with Worker(fake()) as worker:
        with worker.running():
            worker.load()
        (pid,) = worker._group()
        deadline = time.monotonic() + 2
        while (state := _state(pid)) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state == "T"
        assert worker.peak_rss_mib() > 1
        assert worker.cpu_seconds() > 0
        with worker.running():
            worker.generate([PROMPT], 1)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
