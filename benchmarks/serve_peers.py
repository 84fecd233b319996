"""Peers of `kvjax bench serve`: each in its own environment, with the same weights and prompts.

kvjax takes part in the same way: a worker process with the same small HTTP server in front, so that
what the server and the client cost is the same for all. Only one of them runs at a time. A target
that does other work than what was asked is refused: its numbers would say nothing.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvjax.benchmarks import engine, flags
from kvjax.benchmarks.bounds import Work
from kvjax.benchmarks.client import Record
from kvjax.benchmarks.engine_manifest import Counters
from kvjax.benchmarks.openai_target import OpenAITarget
from kvjax.benchmarks.peers import TARGETS
from kvjax.benchmarks.results import Results
from kvjax.benchmarks.serve_rounds import Side
from kvjax.benchmarks.workers import UnequalWork, Worker, WorkerFailed
from kvjax.benchmarks.workloads import Part, Request

_SIZES = {  # of every target that has them, unless flags say other ones: vLLM's server's step
    "max_model_len": 4096, "max_num_seqs": 8, "max_num_batched_tokens": 2048,
}  # fmt: skip


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

    def counters(self) -> Counters:
        """What the target's engine has counted, where it does."""
        return Counters(**self.worker.ask("counters")["counters"])

    async def close(self) -> None:
        self.worker.close()


def require_single(requests: Sequence[Request]) -> None:
    """Raises `ValueError` for prompts with several completions."""
    for request in requests:
        if request.n != 1:
            raise ValueError(f"peers generate one completion per prompt, got n={request.n}")


def as_ids(requests: Sequence[Request], encode: Callable[[str], list[int]]) -> list[Request]:
    """The same prompts as token ids, for all alike."""

    def part(one: Part) -> Part:
        if not one.text:
            return one
        return Part(token_ids=tuple(encode(one.text)), passage=one.passage)

    return [
        dataclasses.replace(request, parts=tuple(part(one) for one in request.parts))
        for request in requests
    ]


def open_peers(args: argparse.Namespace, record: dict[str, Any]) -> list[Side]:
    """A side for kvjax and each peer that can run; the others are failures in `record`.

    All have the same weights, threads, longest sequence, sequences at a time and tokens of a step.
    """
    from kvjax.build import open_checkpoint

    checkpoint = open_checkpoint(args.model or flags.MODEL)
    settings = {**_SIZES, **flags.engine_settings(args)}
    options = [f"{k}={json.dumps(v)}" for k, v in settings.items() if k != "dtype"]
    asked = argparse.Namespace(
        targets=list(dict.fromkeys(["kvjax", *args.peer])), peer_env=args.peer_env, kvjax_env=[],
        kvjax_option=options, threads=args.threads, weights=args.weights,
    )  # fmt: skip
    missing = Results(Path("unused"), {})
    env = engine.thread_settings(args.threads)
    targets = engine.find_targets(asked, args.dtype, checkpoint.path, env, missing)
    record["failures"] += [{"target": e["target"], "error": e["error"]} for e in missing.errors]
    sizes = {"streams": True} | {name: settings[name] for name in _SIZES}
    sides: list[Side] = []
    workers: list[Worker] = []
    for target in targets:
        workers.append(worker := Worker(target, timeout_s=args.timeout))
        shared = {"streams": True} if target.name == "kvjax" else sizes
        try:
            sides.append(_open(worker, shared, record["manifest"]))
        except WorkerFailed as error:
            worker.close()
            record["failures"].append({"target": target.name, "error": str(error)})
        except BaseException:
            for one in workers:
                one.close()
            raise
    if not sides or sides[0].target.name != "kvjax":
        for worker in workers:
            worker.close()
        raise ValueError(f"kvjax itself did not start: {record['failures']}")
    work = Work.from_json(record["manifest"]["engine"]["work_per_token"])
    for side in sides:
        side.work, side.ceilings = work, record["manifest"]["ceilings"]
    return sides


def _open(worker: Worker, options: dict[str, Any], about: dict[str, Any]) -> Side:
    """A worker that is loaded, listens and waits for its turn; the manifest says what it is."""
    target = worker.target
    versions = worker.load(**options)["versions"]
    known = {**target.options, **options, "model": Path(target.options["model"]).name}
    about.setdefault("targets", {})[target.name] = {"versions": versions, "options": known}
    if (described := worker.ask("about")["about"]) is not None:
        about["engine"] = described
    counted = worker.ask("counters")["counters"]
    served = WorkerServed(worker, worker.ask("listen")["port"])
    with worker.running():  # paused until its turn
        pass
    return Side(
        served,
        count=served.counters if counted is not None else None,
        before=None if counted is None else Counters(**counted),
        memory=lambda: {"peak_rss_mib": worker.peak_rss_mib()},
        turn=worker.running,
    )


def same_outputs(side: Side, other: Side) -> float | None:
    """The share of requests that got the same tokens from both, over the rounds that both have.

    Greedy tokens of the same weights differ where two are nearly as likely, and then go on so.
    """
    pairs = [
        (a.token_ids, b.token_ids)
        for (mine, _), (others, _) in zip(side.rounds, other.rounds, strict=False)
        for a, b in zip(mine, others, strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else None


def require_equal_work(records: Sequence[Record], requests: Sequence[Request], name: str) -> None:
    """Raises `UnequalWork` unless every prompt and every answer has the length asked for."""
    for record, request in zip(records, requests, strict=True):
        if record.error:
            raise UnequalWork(f"{name}: {record.error}")
        if record.input_len != (asked := _prompt_len(request, requests)):
            raise UnequalWork(
                f"{name}: a prompt of {asked} tokens was sent, {record.input_len} ran"
            )
        if record.output_len != request.max_tokens:
            raise UnequalWork(
                f"{name}: {request.max_tokens} new tokens asked for, got {record.output_len}"
            )


def _prompt_len(request: Request, requests: Sequence[Request]) -> int:
    """Tokens of a prompt of ids, with answers of the lengths asked for in it."""
    quoted = sum(requests[earlier].max_tokens for earlier in request.after)
    return quoted + sum(len(part.token_ids) for part in request.parts)
