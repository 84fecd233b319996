"""Batch inference over examples/*.jsonl with a real model, and what was reused. `make demo`.

Fetches the model on first use and compiles the engine's programs; both are kept for next time.
"""

import argparse
import sys
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from kvjax import LLM, RequestOutput, SamplingParams
from kvjax.jsonl import Job, parse_json, read_lines

_COLUMNS = (
    "requests", "prompt tokens", "reused exactly", "computed", "output tokens", "first token",
    "tokens/s",
)  # fmt: skip


def main() -> int:
    """Runs the demo; 1 if a request failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("files", nargs="*", type=Path, help="default: all of examples/")
    args = parser.parse_args()
    files = args.files or sorted(Path(__file__).parent.glob("*.jsonl"))

    started = time.monotonic()
    llm = LLM(
        args.model, dtype=args.dtype, max_model_len=1024, max_num_seqs=8, max_num_batched_tokens=256
    )
    print(f"loaded {args.model} in {time.monotonic() - started:.1f} s", flush=True)
    started = time.monotonic()
    llm.warm_up()
    seconds = time.monotonic() - started
    print(f"compiled {llm.engine.runner.compiles} programs in {seconds:.1f} s\n", flush=True)

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # 80 columns
    table.add_column("examples/", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name.replace(" ", "\n"), no_wrap=True, justify="right")
    failed = 0
    for file in files:
        with file.open("rb") as lines:
            jobs = [parse_json(line, SamplingParams()) for line in read_lines(lines)]
        started = time.monotonic()
        outputs = llm.generate([job.prompt for job in jobs], [job.params for job in jobs])
        seconds = time.monotonic() - started
        for job, output in zip(jobs, outputs, strict=True):
            failed += output.error is not None
            _print(job, output)
        table.add_row(file.stem, *_row(outputs, seconds))
    console = Console()
    console.print(table)
    console.print("First token: mean wait of a request, its queueing in the batch included.")
    return 1 if failed else 0


def _print(job: Job, output: RequestOutput) -> None:
    print(f"{job.id}:")
    for completion in output.outputs:
        text = " ".join(completion.text.split())
        print(f"  {text}{'' if completion.finish_reason == 'stop' else ' ...'}")
    if output.error is not None:
        print(f"  failed: {output.error}", file=sys.stderr)


def _row(outputs: list[RequestOutput], seconds: float) -> list[str]:
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    reused = sum(output.num_cached_tokens for output in outputs)
    made = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    waits = [o.metrics.time_to_first_token or 0.0 for o in outputs if o.metrics is not None]
    return [
        str(len(outputs)), str(prompt), str(reused), str(prompt - reused), str(made),
        f"{sum(waits) / max(len(waits), 1):.2f} s", f"{made / seconds:.0f}",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
