"""`kvjax bench throughput`: all prompts of a workload at once through `LLM.generate`.

Flags, keys and the printed line are `vllm bench throughput`'s. The rounds have the same prompts and
begin with an empty prefix cache; the figures at the top are those of all rounds together.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from kvjax.benchmarks import bounds, engine_manifest, flags, manifest, results, workloads
from kvjax.benchmarks.engine_manifest import Counters
from kvjax.benchmarks.workloads import Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `kvjax bench throughput`."""
    flags.add_engine(parser)
    flags.add_workload(parser)
    parser.add_argument("--n", type=int, help="completions of each prompt (the workload's)")
    parser.add_argument("--async-engine", action="store_true", help="AsyncLLM instead of LLM")
    parser.add_argument("--rounds", type=int, default=3, help="runs of all prompts (3)")
    flags.add_results(parser, "throughput")


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes. Raises `ValueError` before anything is loaded."""
    results.require_writable(args.output_json)
    if args.rounds < 1 or (args.n or 1) < 1:
        raise ValueError(f"--rounds and --n must be at least 1, got {args.rounds} and {args.n}")
    name, options = flags.workload(args)
    requests = workloads.build(name, options)
    if any(request.after for request in requests):
        raise ValueError(f"{name} quotes answers, which needs kvjax bench serve")
    about = manifest.base("throughput")
    about |= {
        "seed": args.seed,
        "model": {"name": Path(args.model).name},
        "workload": flags.about(name, options, requests),
        "sizes": {"n": args.n, "async_engine": args.async_engine},
    }
    record = measure(args, requests, about)
    results.write_json(args.output_json, record)
    print(
        f"Throughput: {record['requests_per_second']:.2f} requests/s, "
        f"{record['tokens_per_second']:.2f} total tokens/s, "
        f"{record['output_tokens_per_second']:.2f} output tokens/s"
    )
    print(f"Total num prompt tokens:  {record['num_prompt_tokens']}")
    print(f"Total num output tokens:  {record['num_output_tokens']}")
    print(f"Cache hit rate:  {record['cache_hit_rate']:.3f}")
    print(engine_manifest.lines(record))
    print(f"results: {args.output_json}")
    return 0


def measure(
    args: argparse.Namespace, requests: list[Request], about: dict[str, Any]
) -> dict[str, Any]:
    """The record of all rounds; the file holds those so far after each of them."""
    from kvjax import LLM, SamplingParams
    from kvjax.benchmarks.async_engine import AsyncEngine
    from kvjax.build import open_checkpoint

    settings = flags.engine_settings(args)
    open_checkpoint(args.model)  # a wrong name is said before anything is measured
    about["ceilings"] = bounds.ceilings(args.dtype)
    llm = AsyncEngine(args.model, **settings) if args.async_engine else LLM(args.model, **settings)
    llm.warm_up()
    about["engine"] = engine_manifest.of_engine(llm.engine, llm.get_tokenizer())
    prompts = [_prompt(request) for request in requests]
    params = [
        SamplingParams(n=args.n or r.n, max_tokens=r.max_tokens, temperature=1.0, ignore_eos=True,
                       seed=args.seed)
        for r in requests
    ]  # fmt: skip
    llm.generate(prompts[0], SamplingParams(max_tokens=2, ignore_eos=True))
    before, rounds, ran = Counters.of(llm.engine), [], []
    record: dict[str, Any] = {
        "version": results.VERSION, "command": "throughput", "manifest": about,
    }  # fmt: skip
    for _ in range(args.rounds):
        llm.reset_prefix_cache()
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - start
        for output in outputs:
            if output.error is not None:
                raise output.error
        counts = {
            "num_prompt_tokens": sum(len(o.prompt_token_ids) for o in outputs),
            "num_output_tokens": sum(len(c.token_ids) for o in outputs for c in o.outputs),
            "num_cached_tokens": sum(o.num_cached_tokens for o in outputs),
        }
        ran += [
            bounds.Sequence(len(o.prompt_token_ids), o.num_cached_tokens, r.max_tokens, p.n)
            for o, p, r in zip(outputs, params, requests, strict=True)
        ]
        rounds.append(rates(seconds, len(requests), counts))
        record |= {"status": "running", **together(rounds), "rounds": rounds}
        results.write_json(args.output_json, record)
    about["load_average_after"] = list(os.getloadavg())
    added = Counters.of(llm.engine).since(before)
    if (ceilings := about["ceilings"]) is not None:
        work, seconds = bounds.Work.of(llm.engine), record["elapsed_time"]
        record |= bounds.shares(work, ceilings, ran, seconds, added["steps"])
    record |= {**added, **engine_manifest.peak_memory(), "programs": before.compiles}
    if isinstance(llm, AsyncEngine):
        llm.close()
    return {**record, "compile_seconds": before.compile_seconds, "status": "complete"}


def rates(seconds: float, num_requests: int, counts: dict[str, int]) -> dict[str, Any]:
    """`vllm bench throughput`'s keys, and how many prompt tokens were cached."""
    total = counts["num_prompt_tokens"] + counts["num_output_tokens"]
    return {
        "elapsed_time": seconds,
        "num_requests": num_requests,
        "total_num_tokens": total,
        "requests_per_second": num_requests / seconds,
        "tokens_per_second": total / seconds,
        "output_tokens_per_second": counts["num_output_tokens"] / seconds,
        **counts,
        "cache_hit_rate": counts["num_cached_tokens"] / counts["num_prompt_tokens"],
    }


def together(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The same over all rounds."""
    names = ("num_prompt_tokens", "num_output_tokens", "num_cached_tokens")
    counts = {name: sum(r[name] for r in rounds) for name in names}
    seconds = sum(r["elapsed_time"] for r in rounds)
    return rates(seconds, sum(r["num_requests"] for r in rounds), counts)


def _prompt(request: Request) -> Any:
    if all(part.text for part in request.parts):
        return "".join(part.text for part in request.parts)
    return [token for part in request.parts for token in part.token_ids]
