"""What the engine costs over its own parts, in one process: ratios, interleaved, median of rounds.

- decode: tokens/s of `LLM.generate` against the compiled step called in a loop (same sampling, same
  context, no engine);
- prefill: the compiled step against a program of its matrix products alone;
- hit: time to first token after a prefix hit against one step of as many tokens at that context;
- miss: the same novel prompts with prefix caching on and off.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvjax.benchmarks import engine_manifest, manifest, prompts
from kvjax.benchmarks.results import VERSION, require_writable, write_json

_PROMPT, _DECODE = 512, 127
_HIT, _SUFFIX = 1500, 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m benchmarks overhead`."""
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtypes", default="float32,bfloat16,int8")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("bench-results/overhead.json"))


def run(args: argparse.Namespace) -> int:
    """Measures and writes after every dtype."""
    require_writable(args.out)
    record: dict[str, Any] = {
        "version": VERSION,
        "command": "overhead",
        "status": "running",
        "manifest": {**manifest.base("overhead"), "engines": {}},
        "rounds": args.rounds,
        "results": {},
    }
    for dtype in args.dtypes.split(","):
        engines = record["manifest"]["engines"]
        record["results"][dtype], engines[dtype] = measure(args.model, dtype, args.rounds)
        write_json(args.out, record)
        for name, row in record["results"][dtype].items():
            print(f"{dtype:9} {name:22} {_line(row)}", flush=True)
    record["status"] = "complete"
    write_json(args.out, record)
    return 0


def measure(model: str, dtype: str, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """All four comparisons for one dtype, and what the engine was."""
    from kvjax import LLM

    sizes: dict[str, Any] = {
        "dtype": dtype, "max_model_len": 2048, "max_num_seqs": 8, "max_num_batched_tokens": 512,
    }  # fmt: skip
    llm = LLM(model, **sizes)
    llm.warm_up()
    tokenizer = llm.get_tokenizer()
    stream = prompts.TokenStream(tokenizer.encode(prompts.text()))
    found: dict[str, Any] = {}
    for batch in (1, 8):
        found[f"decode batch {batch}"] = _interleaved(
            rounds,
            lambda batch=batch: _engine_decode(llm, stream, batch),
            lambda batch=batch: _raw_decode(llm, batch),
        )
    found["prefill 512"] = _interleaved(
        rounds, lambda: _raw_step(llm, _PROMPT, 0), _products(llm, _PROMPT)
    )
    prefix = stream.take(_HIT)
    _first_token(llm, prefix + stream.take(_SUFFIX))
    found["prefix hit 1500+32"] = _interleaved(
        rounds,
        lambda: _first_token(llm, prefix + stream.take(_SUFFIX)),
        lambda: _raw_step(llm, _SUFFIX, _HIT),
    )
    without = LLM(model, **sizes, enable_prefix_caching=False)
    without.warm_up()
    cut = [stream.take(256) for _ in range(8)]
    fresh = iter(range(10_000))

    def novel() -> list[list[int]]:
        return [[next(fresh) + 100, *ids] for ids in cut]  # never a common first token

    for _ in range(-(-llm.engine.scheduler.pool.num_pages * llm.engine.spec.page_size // 2048)):
        _seconds(llm, novel())  # every page was written once: from here on misses evict

    found["cache on / off, 0 hits"] = _interleaved(
        rounds, lambda: _seconds(llm, novel()), lambda: _seconds(without, novel())
    )
    return found, engine_manifest.of_engine(llm.engine, tokenizer)


def _interleaved(rounds: int, a: Callable[[], float], b: Callable[[], float]) -> dict[str, Any]:
    """A B A B; the ratio of each pair, so that drift of the machine cancels."""
    a()
    b()
    pairs = [(a(), b()) for _ in range(rounds)]
    ratios = sorted(x / y for x, y in pairs)
    return {
        "a_s": [x for x, _ in pairs],
        "b_s": [y for _, y in pairs],
        "ratio_median": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
    }


def _line(row: dict[str, Any]) -> str:
    a, b = statistics.median(row["a_s"]), statistics.median(row["b_s"])
    return (
        f"{a * 1e3:9.2f} ms against {b * 1e3:9.2f} ms: ratio {row['ratio_median']:.3f} "
        f"({row['ratio_min']:.3f} to {row['ratio_max']:.3f})"
    )


def _engine_decode(llm: Any, stream: prompts.TokenStream, batch: int) -> float:
    """Seconds per decode step of a batch, by the engine's own clock: first to last token."""
    from kvjax import SamplingParams

    ids = _PROMPTS.setdefault(batch, [stream.take(_PROMPT) for _ in range(batch)])
    params = SamplingParams(max_tokens=_DECODE + 1, temperature=0.0, ignore_eos=True)
    requests = [llm._intake.request(i, params) for i in ids]
    for request in requests:
        llm.engine.add(request)
    while any(r.sequences[0].num_output < 2 for r in requests):
        llm.engine.step()
    start, before = time.perf_counter(), sum(r.sequences[0].num_output for r in requests)
    while not all(r.finished for r in requests):
        llm.engine.step()
    made = sum(r.sequences[0].num_output for r in requests) - before
    return (time.perf_counter() - start) * batch / made


_PROMPTS: dict[int, list[list[int]]] = {}  # warm after the first round: decode is what is timed


def _raw_decode(llm: Any, batch: int) -> float:
    """Seconds per call of the compiled decode step in a loop, at the mid context of the other."""
    import numpy as np

    runner = llm.engine.runner
    call = _program(llm, batch, 1, _PROMPT + _DECODE // 2, decode=True)
    call()
    start = time.perf_counter()
    for _ in range(_DECODE):
        np.asarray(call().tokens)
    assert runner.is_warm
    return (time.perf_counter() - start) / _DECODE


def _raw_step(llm: Any, tokens: int, context: int) -> float:
    import numpy as np

    call = _program(llm, 1, tokens, context, decode=False)
    start = time.perf_counter()
    np.asarray(call().tokens)
    return time.perf_counter() - start


def _program(llm: Any, seqs: int, tokens: int, context: int, *, decode: bool) -> Callable[[], Any]:
    """A call of the compiled step with fixed inputs: `seqs` sequences of `tokens` tokens each."""
    import dataclasses

    import numpy as np

    from kvjax.cache.pages import KVView
    from kvjax.decode import RowRequest
    from kvjax.decode import pack_rows as pack
    from kvjax.request import SamplingParams

    runner = llm.engine.runner
    bucket = min(
        b for b in runner.buckets
        if b.decode == decode and b.tokens >= seqs * tokens and (decode or b.rows < b.tokens)
    )  # fmt: skip
    layout, program = runner._layout(bucket), runner._program(bucket)
    batch = layout.padding()
    size, per_seq = runner.spec.page_size, -(-(context + tokens) // runner.spec.page_size)
    view = batch.views[0]
    names = [f.name for f in dataclasses.fields(KVView) if getattr(view, f.name) is not None]
    fields: dict[str, Any] = {name: np.array(getattr(view, name)) for name in names}
    starts, rows = np.array(batch.query_starts), np.array(batch.logits_rows)
    positions = np.array(batch.positions)
    for s in range(seqs):
        span = slice(s * tokens, (s + 1) * tokens)
        indices = np.arange(context, context + tokens)
        fields["block_tables"][s, :per_seq] = np.arange(s * per_seq, (s + 1) * per_seq)
        table = fields["block_tables"][s]
        positions[span] = indices
        fields["write_slots"][span] = table[indices // size] * size + indices % size
        fields["visible_hi"][span] = indices + 1
        fields["kv_lens"][s] = context + tokens
        rows[s] = (s + 1) * tokens - 1
        starts[s + 1 :] = (s + 1) * tokens
    greedy = SamplingParams(temperature=0.0)
    batch = dataclasses.replace(
        batch,
        positions=positions,
        query_starts=starts,
        logits_rows=rows,
        views=tuple(KVView(**fields) for _ in batch.views),
        sampling=pack(
            [RowRequest(seat=s, params=greedy, seed=0, position=context) for s in range(seqs)],
            bucket.rows, runner.limits.max_num_seqs, runner.arguments,
        ),
    )  # fmt: skip
    buffer = layout.pack(batch)

    def call() -> Any:
        runner.pages, runner.state, out = program(
            runner._weights, runner.pages, runner.state, buffer
        )
        return out

    return call


def _products(llm: Any, tokens: int) -> Callable[[], float]:
    """A program of the matrix products that a prefill of `tokens` tokens cannot do without.

    An MLP's gate is applied to what its product leaves, as the step does it, in the same kernel.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from kvjax.models.layers import Linear

    runner = llm.engine.runner
    model = nnx.merge(runner._graph, jax.tree.unflatten(runner._weights_tree, runner._weights))
    linears = [
        m for path, m in nnx.iter_modules(model)
        if isinstance(m, Linear) and "embedding" not in path and "output" not in path
    ]  # fmt: skip
    head = model.embedding.table if model.output is None else model.output
    seats, activation = runner.limits.max_num_seqs, model.blocks[0].mlp.activation
    graph, state = nnx.split((linears, head))
    inputs = {
        width: jnp.ones((tokens, width), jnp.float32)
        for width in {m.shape[-1] for m in [*linears, head]}
    }

    @jax.jit
    def multiply(state: Any, inputs: Any) -> Any:
        linears, head = nnx.merge(graph, state)
        # Each product waits for the one before, as in the step: none can be shared or dropped, and
        # their results take turns in the same memory.
        inputs, last = dict(inputs), jnp.float32(0)
        for m in linears:
            x = inputs[m.shape[-1]] = inputs[m.shape[-1]].at[0, 0].set(last)  # in place
            y = m.gated(x, activation) if len(m.shape) == 3 and m.shape[0] == 2 else m(x)
            last = jax.lax.optimization_barrier(y).reshape(-1)[0]
        return head(inputs[head.shape[-1]][:seats].at[0, 0].set(last))

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(multiply(state, inputs))
        return time.perf_counter() - start

    return seconds


def _first_token(llm: Any, ids: list[int]) -> float:
    from kvjax import SamplingParams

    out = llm.generate(ids, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))[0]
    return out.metrics.time_to_first_token


def _seconds(llm: Any, batch: list[list[int]]) -> float:
    from kvjax import SamplingParams

    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    start = time.perf_counter()
    outputs = llm.generate(batch, params)
    assert all(out.num_cached_tokens == 0 for out in outputs)
    return time.perf_counter() - start
