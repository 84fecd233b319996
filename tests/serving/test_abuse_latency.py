"""What bad clients that never pause cost the good ones: less than half of their time."""

import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from tests.serving.test_process import FLAGS, Process

ROUNDS, ASKED = 6, 6
LIMITS = ["--max-body-bytes=1M", "--header-timeout=5", "--body-timeout=2", "--write-timeout=2"]


@pytest.fixture(scope="module")
def process(tiny_path, tmp_path_factory) -> Iterator[Process]:
    words = [str(tiny_path), "--port=0", *FLAGS, *LIMITS]
    started = Process(tmp_path_factory.mktemp("abused"), words)
    yield started
    started.popen.kill()
    started.popen.wait()


def ask(process: Process) -> float:
    """Seconds that an honest request takes."""
    body = {"prompt": "ab", "max_tokens": 150, "temperature": 0, "ignore_eos": True}
    start = time.monotonic()
    assert process.ask("/v1/completions", json.dumps(body).encode())[0] == 200
    return time.monotonic() - start


def times(process: Process, abusers: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Median seconds of a request while the abusers are at it, and while they are stopped."""
    alone: list[float] = []
    abused: list[float] = []
    for _ in range(ROUNDS):
        abused += [ask(process) for _ in range(ASKED)]
        abusers.send_signal(signal.SIGSTOP)
        alone += [ask(process) for _ in range(ASKED)]
        abusers.send_signal(signal.SIGCONT)
    assert abusers.poll() is None
    return statistics.median(abused), statistics.median(alone)


@pytest.mark.slow
@pytest.mark.alone
def test_latency_stays_within_one_and_a_half_while_bad_clients_do_their_worst(process):
    port = process.url.rpartition(":")[2]
    ask(process)
    abusers = subprocess.Popen([sys.executable, "-m", "tests.serving.abusers", port, "0"])
    try:
        time.sleep(2.0)  # until all of them are at it
        memory = psutil.Process(process.popen.pid)
        before = memory.memory_info().rss
        abused, alone = times(process, abusers)
        grown = memory.memory_info().rss - before
    finally:
        abusers.kill()
        abusers.wait()
    print(f"\n{abused / alone:.2f} of {alone * 1000:.0f} ms, {grown / 2**20:+.1f} MiB")
    assert abused / alone < 1.5
    assert grown < 32 << 20
    status, refused = process.ask("/metrics")
    assert status == 200
    for name in ("400", "408", "413"):
        assert f'status="{name}"'.encode() in refused, f"nobody was told {name}"
