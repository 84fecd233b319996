"""Worker processes of the engine benchmark: started, asked, paused between questions, and ended.

Only one worker computes at a time. The others are paused with SIGSTOP (the whole process group), so
no engine's polling or spinning threads can take time from the one that is measured.
"""

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvjax.benchmarks.peers import WORKER
from kvjax.errors import KVJaxError


class WorkerFailed(KVJaxError, RuntimeError):
    """A worker answered with an error, ended, or took longer than the time allowed."""


class TargetRefused(WorkerFailed):
    """The target cannot run what was asked (a dtype, a batch) and says why."""


class UnequalWork(KVJaxError, ValueError):
    """A target did not generate the number of tokens asked for, so its time says nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A target ready to be started: which Python runs which file with which options."""

    name: str
    python: Path
    file: Path
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)  # added to this process's
    cpus: Sequence[int] = ()
    compiles: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Generation:
    """One timed call inside a worker. Seconds count from the start of the call."""

    token_ids: list[list[int]]
    seconds: float
    first_token_s: list[float] | None
    cached_tokens: list[int] | None


class Worker:
    """A running target. Not loaded until `load`; every method blocks until the answer is there."""

    def __init__(
        self,
        target: Target,
        *,
        timeout_s: float = 900.0,
        log: Path | None = None,
        extra_env: Mapping[str, str] | None = None,
    ) -> None:
        self.target = target
        self.timeout_s = timeout_s
        self.started = time.perf_counter()
        self._loaded = False
        command = [str(target.python), str(WORKER), str(target.file)]
        if target.cpus:
            command += ["--cpus", ",".join(map(str, target.cpus))]
        with contextlib.ExitStack() as stack:
            stderr = stack.enter_context(open(log or os.devnull, "ab"))
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **target.env, **(extra_env or {})},
                start_new_session=True,  # its own process group: paused and ended as a whole
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._buffer = b""

    @property
    def alive(self) -> bool:
        """Whether the process is there; it may be paused."""
        return self._process.poll() is None

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one request; raises WorkerFailed (and ends the process if it hangs)."""
        try:
            self._stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            self._stdin.flush()
        except OSError as error:
            raise WorkerFailed(f"{self.target.name}: the worker has ended") from error
        answer = json.loads(self._read_line(op))
        if not answer["ok"]:
            kind = TargetRefused if answer.get("refused") else WorkerFailed
            raise kind(f"{self.target.name}: {op}: {answer['error']}")
        return answer

    def load(self, **options: Any) -> dict[str, Any]:
        """Builds the target with its options and `options`; returns `seconds` and `versions`."""
        answer = self.ask("load", options={**self.target.options, **options})
        self._loaded = True
        return answer

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Generation:
        """`max_tokens` greedy tokens per prompt; raises UnequalWork when the counts differ."""
        answer = self.ask("generate", prompts=list(map(list, prompts)), max_tokens=max_tokens)
        counts = [len(ids) for ids in answer["token_ids"]]
        if counts != [max_tokens] * len(prompts):
            raise UnequalWork(
                f"{self.target.name}: {max_tokens} new tokens for each of {len(prompts)} prompts "
                f"expected, got {counts}"
            )
        return Generation(
            token_ids=answer["token_ids"],
            seconds=answer["seconds"],
            first_token_s=answer.get("first_token_s"),
            cached_tokens=answer.get("cached_tokens"),
        )

    def reset(self) -> None:
        """Empties the target's prefix cache where it can be emptied."""
        self.ask("reset")

    def keep_prefix(self, tokens: Sequence[int]) -> None:
        """Keeps the KV of `tokens` where the target does not keep prefixes by itself."""
        self.ask("keep_prefix", tokens=list(tokens))

    @contextlib.contextmanager
    def running(self) -> Iterator["Worker"]:
        """Lets the worker run inside the block and pauses it afterwards."""
        self._signal(signal.SIGCONT)
        try:
            yield self
        finally:
            self._signal(signal.SIGSTOP)

    def peak_rss_mib(self) -> float:
        """Sum of the peak resident sizes of the worker's processes, in MiB (Linux; else 0).

        Pages that processes of one worker share are counted once for each.
        """
        kib = 0
        for pid in self._group():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("VmHWM:"):
                        kib += int(line.split()[1])
        return kib / 1024

    def cpu_seconds(self) -> float:
        """CPU time the worker's living processes have used so far (Linux; else 0)."""
        ticks = 0
        for pid in self._group():
            with contextlib.suppress(OSError):
                fields = _stat_fields(pid)
                ticks += int(fields[11]) + int(fields[12])  # utime, stime
        return ticks / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends the worker's processes: asks first, then kills. Safe to call twice."""
        if self.alive:
            with contextlib.suppress(OSError):
                self._signal(signal.SIGCONT)
                self._stdin.write(b'{"op": "exit"}\n')
                self._stdin.flush()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=15 if self._loaded else 1)
        self._kill()
        for pipe in (self._stdin, self._stdout):
            with contextlib.suppress(OSError):
                pipe.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # also children its leader left behind
        self._process.wait()

    def _signal(self, number: int) -> None:
        if self.alive:
            os.killpg(self._process.pid, number)

    def _read_line(self, op: str) -> bytes:
        deadline = time.monotonic() + self.timeout_s
        pipe = self._stdout.fileno()
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._kill()
                raise WorkerFailed(f"{self.target.name}: {op}: no answer in {self.timeout_s:g} s")
            block = os.read(pipe, 1 << 16)
            if not block:
                self._kill()
                code = self._process.returncode
                raise WorkerFailed(f"{self.target.name}: {op}: the worker ended with {code}")
            self._buffer += block
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _group(self) -> list[int]:
        """Ids of the processes in the worker's group."""
        pids = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                if int(_stat_fields(int(entry.name))[2]) == self._process.pid:
                    pids.append(int(entry.name))
        return pids


def _stat_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third (state) on; the second may hold spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
