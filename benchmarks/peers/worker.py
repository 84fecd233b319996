"""Runs one target and answers JSON lines: `python worker.py TARGET_FILE [--cpus 0,1]`.

Only the standard library is imported, so this runs in every peer's environment. The file defines

    class Target:
        packages: tuple[str, ...]           # distributions whose versions are reported
        def __init__(self, **options): ...  # loads; NotImplementedError("why") refuses the options
        def generate(self, prompts, max_tokens) -> dict:
            # greedy, end-of-sequence ignored, all prompts at once: {"token_ids": [[int]]} and,
            # per prompt where known, "first_token_s": [since the call], "cached_tokens": [int]
        def reset(self) -> None: ...        # optional: forgets every cached prefix
        def about(self) -> dict: ...        # optional: what the run's manifest says of it
        def stream(self, prompt, max_tokens): ...  # optional: see `front.py`
        def counters(self) -> dict: ...     # optional: compilations and steps so far
        def keep_prefix(self, tokens): ...  # optional, where prefixes are not kept by themselves

One request per line on stdin, one answer per line on stdout; all else that is printed goes to
stderr. `generate` answers carry `seconds`, the wall time of the call measured here.
"""

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import runpy
import signal
import sys
import time
import traceback


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent ends; a no-op elsewhere."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)


def versions(packages: list[str]) -> dict[str, str]:
    """Installed versions of `packages`, those that are absent left out; and Python's."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Session:
    """One loaded target and the operations on it. `answer` never raises: errors are answers."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.target = None

    def answer(self, request: dict) -> dict:
        """The reply to one request; blocks while the target computes."""
        try:
            return {"ok": True, **getattr(self, "op_" + request.pop("op"))(**request)}
        except NotImplementedError as why:
            return {"ok": False, "refused": True, "error": f"refused: {why}"}
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            return {"ok": False, "error": text, "traceback": traceback.format_exc()}

    def op_load(self, options: dict) -> dict:
        """Imports the target's file and builds it."""
        start = time.perf_counter()
        target_class = runpy.run_path(self.file)["Target"]
        self.target = target_class(**options)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "versions": versions(list(target_class.packages))}

    def op_generate(self, prompts: list[list[int]], max_tokens: int) -> dict:
        """Generates, timed."""
        assert self.target is not None, "generate before load"
        start = time.perf_counter()
        reply = self.target.generate(prompts, max_tokens)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, **reply}

    def op_about(self) -> dict:
        """What the target says of itself, if anything."""
        about = getattr(self.target, "about", None)
        return {"about": None if about is None else about()}

    def op_listen(self) -> dict:
        """Serves the target over HTTP from now on; the port."""
        assert self.target is not None, "listen before load"
        front = runpy.run_path(os.path.join(os.path.dirname(__file__), "front.py"))["Front"]
        self.front = front(self.target)
        return {"port": self.front.port}

    def op_counters(self) -> dict:
        """What the target has counted since it was loaded, if it counts."""
        counters = getattr(self.target, "counters", None)
        return {"counters": None if counters is None else counters()}

    def op_reset(self) -> dict:
        """Forgets cached prefixes where the target can; says whether it did."""
        reset = getattr(self.target, "reset", None)
        if reset is not None:
            reset()
        return {"done": reset is not None}

    def op_keep_prefix(self, tokens: list[int]) -> dict:
        """Keeps the KV of `tokens` where the target has to be told so; says whether it did."""
        keep = getattr(self.target, "keep_prefix", None)
        if keep is not None:
            keep(tokens)
        return {"done": keep is not None}


def main() -> None:
    """Serves requests until stdin ends or an `exit` comes."""
    parser = argparse.ArgumentParser(description="one benchmark target, JSON lines on stdin")
    parser.add_argument("file")
    parser.add_argument("--cpus", default="", help="CPUs to stay on, comma-separated")
    args = parser.parse_args()
    die_with_parent()
    if args.cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(cpu) for cpu in args.cpus.split(",")})
    del sys.path[0]  # NOTE this folder: its files must not hide the packages they import
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print; only answers may reach the pipe
    session = Session(args.file)
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "exit":
            break
        replies.write(json.dumps(session.answer(request)) + "\n")


if __name__ == "__main__":
    main()
