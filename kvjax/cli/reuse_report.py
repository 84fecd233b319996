"""`kvjax reuse report`: one prompt run with reuse of KV, and drawn."""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np

from kvjax import jsonl
from kvjax.benchmarks.reuse_measure import kv_deviation
from kvjax.cli.options import open_llm
from kvjax.llm import LLM
from kvjax.models.tokenizers import Tokenizer
from kvjax.request import Chunk, SamplingParams
from kvjax.reuse import Strategy, parse
from kvjax.reuse.report_page import Drawing, html_page, text_page


def run(args: argparse.Namespace, specs: list[str]) -> int:
    """Runs the command."""
    if args.input is None:
        raise ValueError("report needs a JSONL file whose prompt marks chunks: INPUT")
    if len(specs) > 1:
        raise ValueError(f"report takes one --reuse, got {len(specs)}")
    if args.line < 1:
        raise ValueError(f"--line must be at least 1, got {args.line}")
    if args.output is not None and not args.output.parent.is_dir():
        raise ValueError(f"there is no folder {args.output.parent}")
    job = _job(Path(args.input), args.line)
    strategy = parse(specs[0] if specs else job.params.reuse)
    if type(strategy).look_up is Strategy.look_up:
        raise ValueError(f"{strategy.spec} reuses no chunks: give --reuse, such as epic:k=16")
    args.force_reuse = True
    drawing = draw(open_llm(args), args.model, job, strategy, measure=args.measure)
    if args.output is None:
        sys.stdout.write(text_page(drawing))
    else:
        page = text_page if args.output.suffix == ".txt" else html_page
        args.output.write_text(page(drawing), encoding="utf-8", errors="backslashreplace")
        if not args.quiet:
            print(f"kvjax: {args.output}", file=sys.stderr)
    return 0


def draw(llm: LLM, model: str, job: jsonl.Job, strategy: Strategy, *, measure: bool) -> Drawing:
    """Runs a prompt with its chunks encoded ahead; `measure` compares with a full prefill.

    Raises:
      ValueError: the prompt marks no chunk.
    """
    ids, spans = llm.marked_ids(job.prompt)
    if not spans:
        raise ValueError("the prompt marks no chunk")
    chunks = [Chunk(ids[start:stop]) for start, stop in spans]
    salt = job.params.cache_salt
    llm.chunks.put(chunks, strategy=strategy, cache_salt=salt)
    deviation = None
    with llm.open(job.prompt, SamplingParams(reuse=strategy, cache_salt=salt)) as branch:
        report = branch.reuse
        assert report is not None, "a prompt with chunks has a report"
        if measure:
            own = branch.kv()
            exact = SamplingParams(skip_reading_prefix_cache=True)
            with llm.open(list(branch.token_ids), exact) as reference:
                pairs = zip(reference.kv(), own, strict=True)
                deviation = np.stack([kv_deviation(full, other) for full, other in pairs])
    return Drawing(model, report, token_texts(llm.get_tokenizer(), ids), spans, deviation)


def token_texts(tokenizer: Tokenizer, ids: tuple[int, ...]) -> tuple[str, ...]:
    """What each token adds to the text; bytes that are no whole character as their numbers."""
    return tuple(tokenizer.token_bytes(i).decode("utf-8", "backslashreplace") for i in ids)


def _job(path: Path, number: int) -> jsonl.Job:
    with path.open("rb") as stream:
        lines = jsonl.read_lines(stream)
        line = next(itertools.islice(lines, number - 1, None), None)
    if line is None:
        raise ValueError(f"{path} has no line {number}")
    return jsonl.parse_json(line, SamplingParams())
