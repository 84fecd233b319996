"""Peers of `kvjax bench serve`: each in its own environment, with the same weights and prompts.

kvjax takes part in the same way: a worker process with the same small HTTP server in front, so that
what the server and the client cost is the same for all. Only one of them runs at a time. A target
that does other work than what was asked is refused: its numbers would say nothing.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvjax.benchmarks import engine, flags
from kvjax.benchmarks.client import Record
from kvjax.benchmarks.openai_target import OpenAITarget
from kvjax.benchmarks.peers import TARGETS
from kvjax.benchmarks.results import Results
from kvjax.benchmarks.serve_rounds import Side
from kvjax.benchmarks.workers import UnequalWork, Worker, WorkerFailed
from kvjax.benchmarks.workloads import Part, Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options that concern peers."""
    group = parser.add_argument_group("peers")
    group.add_argument("--peer", type=engine.one_of(TARGETS), default=[], help=",".join(TARGETS))
    group.add_argument("--peer-env", action="append", default=[], metavar="NAME=PATH")
    group.add_argument("--threads", type=int, default=2, help="CPUs and threads of each (2)")
    group.add_argument("--weights", type=Path, help="folder for the weights that peers read")
    group.add_argument("--timeout", type=float, default=900.0, help="seconds for one answer")


class WorkerServed(OpenAITarget):
    """A worker's target, through the HTTP server in its process."""

    def __init__(self, worker: Worker, port: int) -> None:
        super().__init__(f"http://127.0.0.1:{port}", "target", name=worker.target.name)
        self.worker = worker

    async def reset(self) -> None:
        self.worker.reset()

    async def close(self) -> None:
        self.worker.close()


def as_ids(requests: Sequence[Request], encode: Any) -> list[Request]:
    """The same prompts as token ids, for all alike. Raises `ValueError` for `n` above 1."""
    found = []
    for request in requests:
        if request.n != 1:
            raise ValueError(f"peers generate one completion per prompt, got n={request.n}")
        parts = [
            Part(token_ids=tuple(encode(part.text))) if part.text else part
            for part in request.parts
        ]
        found.append(Request(tuple(parts), request.max_tokens, at=request.at))
    return found


def open_peers(args: argparse.Namespace, record: dict[str, Any]) -> list[Side]:
    """A side for kvjax and each peer that can run; the others are failures in `record`."""
    from kvjax.build import open_checkpoint

    checkpoint = open_checkpoint(args.model or flags.MODEL)
    if checkpoint.format != "gguf":
        raise ValueError("--peer needs a GGUF file: the peers' weights are made from it")
    settings = flags.engine_settings(args)
    options = [f"{k}={json.dumps(v)}" for k, v in settings.items() if k != "dtype"]
    asked = argparse.Namespace(
        targets=list(dict.fromkeys(["kvjax", *args.peer])), peer_env=args.peer_env, kvjax_env=[],
        kvjax_option=options, threads=args.threads, weights=args.weights,
    )  # fmt: skip
    missing = Results(Path("unused"), {})
    env = engine.thread_settings(args.threads)
    targets = engine.find_targets(asked, args.dtype, checkpoint.path, env, missing)
    record["failures"] += [{"target": e["target"], "error": e["error"]} for e in missing.errors]
    about = record["manifest"].setdefault("targets", {})
    sides = []
    for target in targets:
        worker = Worker(target, timeout_s=args.timeout)
        try:
            answer = worker.load(streams=True)
            about[target.name] = {"versions": answer["versions"]}
            if (engine_about := worker.ask("about")["about"]) is not None:
                record["manifest"]["engine"] = engine_about
            served = WorkerServed(worker, worker.ask("listen")["port"])
        except WorkerFailed as error:
            worker.close()
            record["failures"].append({"target": target.name, "error": str(error)})
            continue
        with worker.running():  # paused until its turn
            pass
        sides.append(Side(served, peak_mib=worker.peak_rss_mib, turn=worker.running))
    if not sides or sides[0].target.name != "kvjax":
        raise ValueError(f"kvjax itself did not start: {record['failures']}")
    return sides


def require_equal_work(records: Sequence[Record], requests: Sequence[Request], name: str) -> None:
    """Raises `UnequalWork` unless every request was answered at the length asked for."""
    for record, request in zip(records, requests, strict=True):
        if record.error:
            raise UnequalWork(f"{name}: {record.error}")
        if record.output_len != request.max_tokens:
            raise UnequalWork(
                f"{name}: {request.max_tokens} new tokens asked for, got {record.output_len}"
            )
