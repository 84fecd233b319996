"""`kvjax bench serve`: a workload sent to an engine as clients would, and what they would see.

The engine in this process by default, any OpenAI-compatible server by its URL. Flags, printed lines
and the keys of the result are `vllm bench serve`'s; `rounds`, `manifest`, reuse and compilation
are ours. A round has prompts of its own where they are generated (the seed goes up by one), and
begins with an empty prefix cache where that can be emptied.
"""

import argparse
import asyncio
import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from kvjax.benchmarks import (
    bounds,
    flags,
    manifest,
    request_plots,
    results,
    serve_flags,
    serve_peers,
    workloads,
)
from kvjax.benchmarks.bounds import Work
from kvjax.benchmarks.client import Target
from kvjax.benchmarks.figures import show
from kvjax.benchmarks.openai_target import OpenAITarget
from kvjax.benchmarks.serve_flags import add_arguments as add_arguments
from kvjax.benchmarks.serve_rounds import Plan, Side, run_rounds
from kvjax.benchmarks.workers import UnequalWork
from kvjax.benchmarks.workloads import Options

_SWITCH = 0.0005  # seconds for which the engine's thread may keep the client from the GIL


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes; 0, or 1 if a request or a target failed.

    Raises `ValueError` and `OSError` for what can be known before anything is measured: bad flags,
    an unwritable folder, a server that is not there, a model that it does not have.
    """
    backend = serve_flags.backend(args)
    plan, about = plan_of(args)
    model = args.model or (flags.MODEL if backend == "kvjax" else args.served_model_name) or ""
    if args.peer and backend != "kvjax":
        raise ValueError("--peer compares with kvjax here: leave the URL out")
    target_path = serve_flags.path(args, backend, model or "model")
    path = results.part_of(target_path) if args.append_result else target_path
    results.require_writable(path)
    about |= {"backend": backend, "model": {"name": Path(model).name}}
    record: dict[str, Any] = {
        "version": results.VERSION, "command": "serve", "status": "running", "manifest": about,
        "date": about["started"], "backend": backend, "endpoint_type": backend,
        "model_id": Path(model).name, "tokenizer_id": Path(args.tokenizer or model).name,
        "num_prompts": about["workload"]["num_requests"], "burstiness": args.burstiness,
        "request_rate": args.request_rate if math.isfinite(args.request_rate) else "inf",
        "max_concurrency": args.max_concurrency, "label": args.label, **_ramp(args),
        **flags.pairs(args.metadata, "--metadata"), "peers": {}, "failures": [],
    }  # fmt: skip
    results.write_json(path, record)
    switch = sys.getswitchinterval()
    try:
        sys.setswitchinterval(_SWITCH)
        asyncio.run(_interruptible(measure(args, backend, plan, record, path)))
    except asyncio.CancelledError:
        print(f"interrupted: what was measured is in {target_path}")
        return 130
    except BaseException:
        if "completed" not in record:  # nothing was measured
            path.unlink(missing_ok=True)
        raise
    finally:
        sys.setswitchinterval(switch)
        if args.append_result and path.exists():
            results.append_json(target_path, record)
            path.unlink()
    show_result(args, backend, record, target_path)
    return int(bool(record["failures"] or record["failed"]))


def show_result(args: argparse.Namespace, backend: str, record: dict[str, Any], path: Path) -> None:
    """Prints the figures, draws what was asked for, and says where the result is."""
    for name, part in {backend: record, **record["peers"]}.items():
        title = f"{name}: Serving Benchmark Result" if record["peers"] else ""
        print(show(part, *([title] if title else [])))
    for error in list(dict.fromkeys(e for e in record["errors"] if e))[:3]:
        print(f"a request failed: {error}")
    for failure in record["failures"]:
        print(f"{failure['target']} failed: {failure['error']}")
    for kind in request_plots.PAGES:
        if getattr(args, f"plot_{kind}"):
            page = path.with_suffix(f".{kind}.html")
            page.write_text(request_plots.PAGES[kind](record), encoding="utf-8")
            print(f"{kind}: {page}")
    print(f"results: {path}")


def _ramp(args: argparse.Namespace) -> dict[str, Any]:
    names = ("ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps")
    return {name: getattr(args, name) for name in names} if args.ramp_up_strategy else {}


def plan_of(args: argparse.Namespace) -> tuple[Plan, dict[str, Any]]:
    """What is sent in each round, and the manifest's beginning. Raises `ValueError`."""
    name, options = flags.workload(args)
    arrivals = serve_flags.arrivals(args)
    count = args.rounds if args.rounds is not None else 3 if args.peer else 1
    if count < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    rounds = [workloads.build(name, _seeded(options, options.seed + r)) for r in range(count)]
    if args.peer:
        serve_peers.require_single(rounds[0])
    if args.peer or args.tokenizer:
        encode = _encoder(args)
        rounds = [serve_peers.as_ids(requests, encode) for requests in rounds]
    num_warmups = args.num_warmups if args.num_warmups is not None else 4 if args.peer else 1
    plan = Plan(
        rounds=rounds,
        times=[arrivals.times(requests, args.seed + r) for r, requests in enumerate(rounds)],
        warm_ups=warm_ups(rounds[0], options, num_warmups),
        max_concurrency=args.max_concurrency,
        percentiles=serve_flags.percentiles(args),
        metrics=serve_flags.metrics(args),
        goodput=serve_flags.goodput(args),
        texts=args.save_detailed,
        bars=not args.disable_tqdm,
        probe_rate=args.probe_request_rate,
    )
    about = manifest.base("serve")
    about["seed"] = args.seed
    about["rounds"] = count
    about["workload"] = flags.about(name, options, rounds[0])
    about["arrivals"] = {k: str(v) for k, v in vars(arrivals).items()}
    about["sampling"] = serve_flags.sampling(args)
    return plan, about


def _encoder(args: argparse.Namespace) -> Callable[[str], list[int]]:
    from kvjax.build import open_checkpoint
    from kvjax.models.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(open_checkpoint(args.tokenizer or args.model or flags.MODEL))
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


async def measure(
    args: argparse.Namespace, backend: str, plan: Plan, record: dict[str, Any], path: Path
) -> None:
    """Opens the target, runs all rounds, fills `record` and writes it after each of them."""
    if serve_flags.BACKENDS[backend] is None:
        from kvjax.build import open_checkpoint

        checkpoint = open_checkpoint(args.model or flags.MODEL)
        if args.peer and checkpoint.format != "gguf":
            raise ValueError("--peer needs a GGUF file: the peers' weights are made from it")
        about = record["manifest"]
        about["ceilings"] = await asyncio.to_thread(bounds.ceilings, args.dtype)
    if args.peer:
        sides = await asyncio.to_thread(serve_peers.open_peers, args, record)
    else:
        sides = [await open_side(args, backend, record)]
    side = sides[0]

    def save() -> None:
        if side.rounds:
            record.update(side.result(plan))
            if args.reuse:  # of a staged prefill the engine counts the padded rows alone
                record["padding_waste"] = None
        for peer in sides[1:]:
            if peer.rounds and not peer.failure:
                done = peer.result(plan)
                done["same_outputs"] = serve_peers.same_outputs(side, peer)
                record["peers"][peer.target.name] = done
        record["manifest"]["load_average_after"] = list(os.getloadavg())
        results.write_json(path, record)

    def check(one: Side, requests: Sequence[workloads.Request]) -> None:
        try:
            if not one.failure:
                serve_peers.require_equal_work(one.rounds[-1][0], requests, one.target.name)
        except UnequalWork as error:
            one.failure = str(error)
        if one.failure:
            record["failures"].append({"target": one.target.name, "error": one.failure})
            record["peers"].pop(one.target.name, None)

    try:
        async with contextlib.AsyncExitStack() as stack:
            if args.profile:
                folder = args.result_dir / "profile"
                traces = {} if side.count is None else {"folder": folder}
                print(f"profile: {folder if traces else 'where the server keeps its own'}")
                await stack.enter_async_context(side.target.profile(**traces))  # type: ignore[attr-defined]
            await run_rounds(sides, plan, save, check if args.peer else None)
        record["status"] = "complete"
    except asyncio.CancelledError:
        record["status"] = "interrupted"
        raise
    except BaseException:
        record["status"] = "failed"
        raise
    finally:
        if side.rounds:
            save()
        for one in sides:
            await one.target.close()


async def _interruptible(work: Coroutine[Any, Any, None]) -> None:
    """Runs `work`, which SIGINT and SIGTERM cancel."""
    task, loop = asyncio.ensure_future(work), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    await task


async def open_side(args: argparse.Namespace, backend: str, record: dict[str, Any]) -> Side:
    """The target that the flags name, ready for requests; fills the manifest's part on it."""
    endpoint = serve_flags.BACKENDS[backend]
    if endpoint is None:
        from kvjax.benchmarks import engine_manifest
        from kvjax.benchmarks.in_process import InProcess

        target = InProcess(
            args.model or flags.MODEL,
            flags.engine_settings(args),
            serve_flags.sampling(args),
            args.reuse,
        )
        counters = await target.warm_up()
        record["manifest"]["engine"] = target.about()
        engine = target.llm.engine
        return Side(
            target,
            before=counters,
            count=lambda: engine_manifest.Counters.of(engine),
            memory=engine_manifest.peak_memory,
            work=Work.of(engine),
            ceilings=record["manifest"]["ceilings"],
        )
    target: Target = OpenAITarget(
        serve_flags.base_url(args),
        args.served_model_name or args.model,
        endpoint=args.endpoint or endpoint,
        body=serve_flags.body(args, args.endpoint or endpoint),
        adapters=serve_flags.adapters(args),
        headers=flags.pairs(args.header, "--header"),
        insecure=args.insecure,
    )
    await target.check(args.ready_check_timeout_sec)
    record["model_id"] = record["manifest"]["model"]["name"] = Path(target.model or "").name
    return Side(target)


def warm_ups(
    requests: Sequence[workloads.Request], options: Options, count: int
) -> list[workloads.Request]:
    """Requests as long as the measured ones on average, which share nothing with them."""
    if count < 0:
        raise ValueError(f"--num-warmups must be at least 0, got {count}")
    if not count:
        return []
    lengths = [sum(len(p.token_ids) for p in r.parts) for r in requests if not r.after]
    if requests[0].parts[0].token_ids:
        sizes = {"num_prompts": count, "input_len": sum(lengths) // len(lengths), "output_len": 8}
        other = {**vars(options), **sizes, "seed": options.seed + 1_000_003}
        return list(workloads.WORKLOADS["random"](Options(**other)))
    part = workloads.Part("This is a request to warm up, and nothing is measured with it. ")
    return [workloads.Request((part,), 8) for _ in range(count)]


def _seeded(options: Options, seed: int) -> Options:
    return Options(**{**vars(options), "seed": seed})
