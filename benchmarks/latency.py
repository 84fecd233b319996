"""`kvjax bench latency`: seconds of one batch from its prompts to its last token.

Flags and keys are `vllm bench latency`'s. Prefix caching is off unless it is asked for: the same
prompts come again in every iteration.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.benchmarks import bounds, engine_manifest, flags, manifest, results
from kvjax.benchmarks.engine_manifest import Counters
from kvjax.benchmarks.workloads import Options, build, digest

PERCENTILES = (10, 25, 50, 75, 90, 99)
_QUICK = {"batch_size": 4, "output_len": 16, "num_iters_warmup": 1, "num_iters": 5}
_DEFAULT = {"batch_size": 8, "output_len": 128, "num_iters_warmup": 10, "num_iters": 30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `kvjax bench latency`."""
    flags.add_engine(parser)
    parser.add_argument("--input-len", type=int, default=32, help="tokens of each prompt (32)")
    for name, value in _DEFAULT.items():
        text = f"({value}; quick: {_QUICK[name]})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=text)
    parser.add_argument("--n", type=int, default=1, help="completions of each prompt (1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small sizes: under two minutes")
    parser.add_argument("--enable-prefix-caching", action="store_true")
    flags.add_results(parser, "latency")


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes. Raises `ValueError` before anything is loaded."""
    results.require_writable(args.output_json)
    sizes = {**_DEFAULT, **(_QUICK if args.quick else {})}
    sizes |= {name: v for name in _DEFAULT if (v := getattr(args, name)) is not None}
    if min(sizes["batch_size"], sizes["output_len"], sizes["num_iters"], args.n) < 1:
        raise ValueError(f"sizes must be at least 1, got {sizes} and n={args.n}")
    settings = flags.engine_settings(args)
    settings["enable_prefix_caching"] = args.enable_prefix_caching
    if args.max_num_seqs is None:
        rows = max(sizes["batch_size"] * args.n, settings.get("max_num_seqs", 1))
        settings["max_num_seqs"] = rows
        settings.setdefault("max_num_batched_tokens", max(512, rows))
    record = measure(args, sizes, settings)
    results.write_json(args.output_json, record)
    print(f"Avg latency: {record['avg_latency']} seconds")
    for p, seconds in record["percentiles"].items():
        print(f"{p}% percentile latency: {seconds} seconds")
    print(engine_manifest.lines(record))
    print(f"results: {args.output_json}")
    return 0


def measure(
    args: argparse.Namespace, sizes: dict[str, int], settings: dict[str, Any]
) -> dict[str, Any]:
    """The record of all iterations; the file holds those so far after each of them."""
    from kvjax import LLM, SamplingParams
    from kvjax.build import open_checkpoint

    about = manifest.base("latency")
    open_checkpoint(args.model)  # a wrong name is said before anything is measured
    ceilings = bounds.ceilings(args.dtype)
    llm = LLM(args.model, **settings)
    llm.warm_up()
    options = Options(
        num_prompts=sizes["batch_size"],
        input_len=args.input_len,
        output_len=sizes["output_len"],
        vocab_size=min(32_000, llm.get_tokenizer().vocab_size),
        seed=args.seed,
    )
    requests = build("random", options)
    prompts = [list(request.parts[0].token_ids) for request in requests]
    params = SamplingParams(
        n=args.n, max_tokens=sizes["output_len"], temperature=1.0, ignore_eos=True, seed=args.seed
    )
    about |= {
        "seed": args.seed,
        "model": {"name": Path(args.model).name},
        "sizes": {**sizes, "input_len": args.input_len, "n": args.n},
        "workload": {"name": "random", "num_requests": len(prompts), "sha256": digest(requests)},
        "engine": engine_manifest.of_engine(llm.engine, llm.get_tokenizer()),
        "ceilings": ceilings,
    }
    warmed = Counters.of(llm.engine)
    work, latencies, cached, before = bounds.Work.of(llm.engine), [], 0, warmed
    record: dict[str, Any] = {"version": results.VERSION, "command": "latency", "manifest": about}
    for number in range(sizes["num_iters_warmup"] + sizes["num_iters"]):
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - start
        counts = {len(c.token_ids) for output in outputs for c in output.outputs}
        assert counts == {sizes["output_len"]}, counts
        if number < sizes["num_iters_warmup"]:
            before = Counters.of(llm.engine)
            continue
        latencies.append(seconds)
        cached += sum(output.num_cached_tokens for output in outputs)
        prompt_tokens = sum(map(len, prompts)) * len(latencies)
        record |= {"status": "running", **summary(latencies), "total_cached_tokens": cached}
        record["cache_hit_rate"] = cached / prompt_tokens
        results.write_json(args.output_json, record)
    about["load_average_after"] = list(os.getloadavg())
    added = Counters.of(llm.engine).since(before)
    if ceilings is not None:
        known = cached / len(latencies) / len(prompts)
        one = bounds.Sequence(args.input_len, known, sizes["output_len"], args.n)
        ran = [one] * len(prompts) * len(latencies)
        record |= bounds.shares(work, ceilings, ran, sum(latencies), added["steps"])
    record |= {**added, **engine_manifest.peak_memory(), "programs": warmed.compiles}
    record["compiles"] = Counters.of(llm.engine).compiles - warmed.compiles
    return {**record, "compile_seconds": warmed.compile_seconds, "status": "complete"}


def summary(latencies: Sequence[float]) -> dict[str, Any]:
    """`vllm bench latency`'s keys, in seconds."""
    values = np.asarray(latencies)
    return {
        "avg_latency": float(values.mean()),
        "std_latency": float(values.std()),
        "latencies": [float(v) for v in values],
        "percentiles": {str(p): float(np.percentile(values, p)) for p in PERCENTILES},
    }
