"""What HTTP and tokenisation add: `kvjax serve` in a process of its own against `AsyncLLM` here.

- throughput: 16 concurrent streams, output tokens per second;
- first token: prompts of 32 to 512 tokens on an idle server, seconds from sending to the first one.

The same prompts, as text over HTTP and as ids to `AsyncLLM`; rounds are interleaved, and what is
reported is the median over rounds of HTTP's share or difference.
"""

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kvjax.benchmarks import engine_manifest, manifest, prompts, results

_STREAMS, _PROMPT, _OUTPUT = 16, 64, 128
_CONTEXT, _STEP = 1024, 512
_LENGTHS = (32, 128, 256, 512)
_REPEATS = 8  # first tokens per length and round


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks http`."""
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench-results/http.json"))


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes."""
    results.require_writable(args.out)
    sizes: dict[str, Any] = {
        "max_model_len": _CONTEXT,
        "max_num_seqs": _STREAMS,
        "max_num_batched_tokens": _STEP,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    command = [sys.executable, "-m", "kvjax.cli", "serve", args.model, "--port=0", "--quiet"]
    command += [f"--dtype={args.dtype}", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            found = re.search(r"at http://[^:]+:(\d+)", line)
            if found is None:
                raise ValueError(f"the server did not start: {line!r}")
            import uvloop

            record = uvloop.run(_measure(args, sizes, int(found[1])))
        finally:
            server.terminate()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1))
    throughput, first = record["throughput"], record["first_token"]
    print(
        f"{_STREAMS} streams: {throughput['direct']:.0f} tokens/s direct, "
        f"{throughput['http']:.0f} over HTTP; {throughput['cost']:+.1%}"
    )
    print(f"first token: {first['added'] * 1000:+.2f} ms (median of differences)")
    return 0


async def _measure(args: argparse.Namespace, sizes: dict[str, Any], port: int) -> dict[str, Any]:
    from kvjax import AsyncLLM

    about = manifest.base("http")
    llm = AsyncLLM(args.model, dtype=args.dtype, compile_when_idle=False, **sizes)
    await llm.call(llm.engine.runner.warm_up)
    source = _Prompts(llm)
    rates: list[tuple[float, float]] = []
    added: list[float] = []
    await _streams(_direct, llm, source)  # warm
    await _streams(_over_http, port, source)
    for round_ in range(args.rounds):
        if round_ % 2:
            http = await _streams(_over_http, port, source)
            rates.append((await _streams(_direct, llm, source), http))
        else:
            direct = await _streams(_direct, llm, source)
            rates.append((direct, await _streams(_over_http, port, source)))
        for length in _LENGTHS:
            for _ in range(_REPEATS):
                text, ids = source.next(length)
                direct = (await _direct(llm, text, ids, 1))[0]
                added.append((await _over_http(port, text, ids, 1))[0] - direct)
    about["engine"] = engine_manifest.of_engine(llm.engine, llm.get_tokenizer())
    await asyncio.to_thread(llm.shutdown)
    return {
        "version": results.VERSION,
        "command": "http",
        "status": "complete",
        "manifest": about,
        "dtype": args.dtype,
        "throughput": {
            "direct": statistics.median(direct for direct, _ in rates),
            "http": statistics.median(http for _, http in rates),
            "cost": 1 - statistics.median(http / direct for direct, http in rates),
            "rounds": rates,
        },
        "first_token": {"added": statistics.median(added), "differences": added},
    }


class _Prompts:
    """Texts that nobody has seen before, with their ids."""

    def __init__(self, llm: Any) -> None:
        self._tokenizer = llm.get_tokenizer()
        self._text = prompts.text()
        self._at = 0

    def next(self, length: int) -> tuple[str, list[int]]:
        self._at += 1
        words = f"{self._at} {self._text[self._at : self._at + 8 * length]}"
        ids = self._tokenizer.encode(words)[:length]
        text = self._tokenizer.decode(ids)
        return text, self._tokenizer.encode(text)


async def _streams(one: Any, target: Any, source: _Prompts) -> float:
    """Output tokens per second of all streams together."""
    jobs = [source.next(_PROMPT) for _ in range(_STREAMS)]
    start = time.perf_counter()
    done = await asyncio.gather(*(one(target, text, ids, _OUTPUT) for text, ids in jobs))
    assert all(count == _OUTPUT for _, count in done), done
    return _STREAMS * _OUTPUT / (time.perf_counter() - start)


async def _direct(llm: Any, text: str, ids: list[int], count: int) -> tuple[float, int]:
    """Seconds to the first token, and tokens."""
    from kvjax import SamplingParams

    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    start, first, tokens = time.perf_counter(), 0.0, 0
    async for output in llm.generate(ids, params):
        first = first or time.perf_counter() - start
        tokens = len(output.outputs[0].token_ids)
    return first, tokens


async def _over_http(port: int, text: str, ids: list[int], count: int) -> tuple[float, int]:
    """The same through a socket. The client only looks for the first event and the usage."""
    body = json.dumps(
        {
            "prompt": text, "max_tokens": count, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
        }
    ).encode()  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    start, first, tail = time.perf_counter(), 0.0, b""
    writer.write(head.encode() + body)
    while data := await reader.read(65536):
        tail = (tail + data)[-1024:]
        if not first and b"data: " in tail:
            first = time.perf_counter() - start
    writer.close()
    found = re.search(rb'"completion_tokens":(\d+)', tail)
    return first, int(found[1]) if found else 0
