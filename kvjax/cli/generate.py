"""`kvjax generate`: a file of prompts in, a file of completions out."""

import argparse
import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from kvjax import jsonl
from kvjax.cli import options
from kvjax.jsonl import Line, RecordFile
from kvjax.llm import LLM
from kvjax.progress import Bar, progress_bar
from kvjax.request import RequestOutput, SamplingParams
from kvjax.stream import Job

HELP = "complete a file of prompts"
EPILOG = """\
INPUT is JSONL or plain text (one prompt a line); '-' or nothing is standard input. A JSONL line
has one of "prompt", "prompt_token_ids", "messages", perhaps an "id", and any sampling parameter
(underscores: "max_tokens"), which wins over the flag. A prompt may be a list of texts and
{"chunk": text} whose KV is reused (--reuse), and so may a message's content. Blank lines are
skipped.

Each line gives one JSON record: id, line (its number), sha256 (of the line), outputs (index, text,
token_ids, finish_reason), num_prompt_tokens, num_cached_tokens, metrics, error, and of a prompt
with chunks what became of its tokens (reuse). Records come as lines finish, unless --ordered. A
line that is wrong gives an error record, and the others still run; the exit status is then 1.

examples:
  kvjax generate smollm2-135m questions.jsonl -o answers.jsonl --max-tokens 64
  kvjax generate smollm2-135m questions.jsonl -o answers.jsonl --resume
  kvjax generate ./my-model prompts.txt --temperature 0 --dtype int8 --kv-cache-memory 2G
"""

_Write = Callable[[dict[str, Any]], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.usage = "kvjax generate MODEL [INPUT] [-o OUT.jsonl] [options]"
    parser.add_argument("model", metavar="MODEL", help="name, folder, .gguf file or hub id")
    parser.add_argument("input", metavar="INPUT", nargs="?", default="-", help="default: stdin")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT.jsonl", help="default: stdout")
    parser.add_argument(
        "--format",
        choices=("auto", "jsonl", "text"),
        default="auto",
        help="of the input; auto: by the name's end, else by the first line",
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted OUT.jsonl")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.jsonl")
    parser.add_argument("--ordered", action="store_true", help="records in the input's order")
    options.add_sampling(parser)
    options.add_engine(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; 1 if a line failed."""
    defaults = SamplingParams(**options.sampling_of(args))  # a wrong flag is told before all else
    if (args.resume or args.overwrite) and args.output is None:
        raise ValueError("--resume and --overwrite need -o OUT.jsonl")
    if args.resume and args.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    with contextlib.ExitStack() as stack:
        source = _open_input(args, stack)
        records = None
        if args.output is not None:
            records = stack.enter_context(
                RecordFile(args.output, resume=args.resume, overwrite=args.overwrite)
            )
        total = _count(source, records)
        lines = jsonl.read_lines(source)
        first = next(lines, None)
        parse = jsonl.parse_json if _is_jsonl(args, first) else jsonl.parse_text
        batch = _Batch(functools.partial(parse, defaults=defaults), records)
        todo = batch.todo(itertools.chain([first] if first else [], lines))
        if (head := next(todo, None)) is not None:
            llm = options.open_llm(args)
            done = len(records.done) if records else 0
            left = None if total is None else total - done
            try:
                with progress_bar(not args.quiet, left) as bar:
                    batch.run(llm, itertools.chain([head], todo), bar, ordered=args.ordered)
            except KeyboardInterrupt:
                if records is not None:
                    print(f"kvjax: {records.path} is whole; --resume continues", file=sys.stderr)
                raise
            if not args.quiet:
                print(f"kvjax: {bar.requests} lines, {batch.num_failed} failed, "
                      f"{bar.output_tokens} tokens; {bar.summary}", file=sys.stderr)  # fmt: skip
    return 1 if batch.num_failed else 0


class _Batch:
    """One run over an input: from lines to records."""

    def __init__(self, parse: Callable[[Line], jsonl.Job], records: RecordFile | None) -> None:
        self._parse, self._records = parse, records
        self._write: _Write = records.write if records else _to_standard_output
        self.num_failed = records.num_failed if records else 0

    def todo(self, lines: Iterator[Line]) -> Iterator[Line]:
        """The lines that have no record yet."""
        return (line for line in lines if self._records is None or not self._records.has(line))

    def run(self, llm: LLM, lines: Iterator[Line], bar: Bar, *, ordered: bool) -> None:
        """Writes a record for every line."""
        for (line, job), result in llm.generate_stream(self._jobs(lines), ordered=ordered):
            if isinstance(job, ValueError):  # there was nothing to run
                result, job = job, None
            error = result
            if isinstance(result, RequestOutput):
                tokens = result.metrics.num_output_tokens if result.metrics else 0
                bar.count(len(result.prompt_token_ids), result.num_cached_tokens, tokens)
                error = result.error
            else:
                bar.count(0, 0, 0)
            if error is not None:
                self.num_failed += 1
                print(f"kvjax: line {line.number}: {error}", file=sys.stderr)
            self._write(jsonl.record(line, job.id if job else jsonl.id_of(line), result))

    def _jobs(self, lines: Iterator[Line]) -> Iterator[Job]:
        for line in lines:
            try:
                job = self._parse(line)
            except ValueError as error:  # goes in without a prompt, and so comes out in its place
                yield (line, error), "", SamplingParams()
            else:
                yield (line, job), job.prompt, job.params


def _open_input(args: argparse.Namespace, stack: contextlib.ExitStack) -> IO[bytes]:
    if args.input == "-":
        return sys.stdin.buffer
    path = Path(args.input)
    if args.output is not None and args.output.exists() and args.output.samefile(path):
        raise ValueError(f"{path} is both the input and the output")
    return stack.enter_context(path.open("rb"))


def _count(source: IO[bytes], records: RecordFile | None) -> int | None:
    """Lines of a file, checked against the records; None for what cannot be read twice."""
    if source is sys.stdin.buffer or not source.seekable():
        return None
    lines = jsonl.read_lines(source)
    total = sum(1 for _ in lines) if records is None else jsonl.check_resumable(lines, records)
    source.seek(0)
    return total


def _is_jsonl(args: argparse.Namespace, first: Line | None) -> bool:
    if args.format != "auto":
        return args.format == "jsonl"
    ending = Path(args.input).suffix
    if ending in (".jsonl", ".ndjson", ".json"):
        return True
    return ending != ".txt" and first is not None and jsonl.looks_like_json(first)


def _to_standard_output(fields: dict[str, Any]) -> None:
    sys.stdout.buffer.write(jsonl.encode_record(fields))
    sys.stdout.buffer.flush()
