"""`python -m benchmarks COMMAND`: `engine` and others measure, `table` shows an engine result."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kvjax.benchmarks import results

COMMANDS = {  # name -> (module with `add_arguments` and `run`, help)
    "compare": ("kvjax.benchmarks.compare", "two results: what changed, and what is noise"),
    "engine": ("kvjax.benchmarks.engine", "kvjax and its peers with the same work, interleaved"),
    "grammar": ("kvjax.benchmarks.grammar", "libraries of structured output, without a model"),
    "http": ("kvjax.benchmarks.http", "the server against AsyncLLM, called directly"),
    "kamera-curves": ("kvjax.benchmarks.kamera_curves", "patches over rank, moves, order, edits"),
    "kernels": ("kvjax.benchmarks.kernels", "the kernels against the device's own ceilings"),
    "latency": ("kvjax.benchmarks.latency", "seconds of one batch, prompts to last token"),
    "overhead": ("kvjax.benchmarks.overhead", "the engine against its own compiled parts"),
    "report": ("kvjax.benchmarks.report", "results as one page with tables and plots"),
    "reuse": ("kvjax.benchmarks.reuse", "reuse strategies against the same model's full prefill"),
    "reuse-speed": ("kvjax.benchmarks.reuse_speed", "first tokens over stored chunks"),
    "serve": ("kvjax.benchmarks.serve", "a workload sent as clients would, in process or to a URL"),
    "startup": ("kvjax.benchmarks.startup", "a new process until its first token"),
    "throughput": ("kvjax.benchmarks.throughput", "all prompts of a workload at once"),
}


class Command(Protocol):
    """What a module in `COMMANDS` has."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. Usage errors exit with 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module_name, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        module: Command = importlib.import_module(module_name)  # type: ignore[assignment]
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    table = commands.add_parser("table", help="a results file as markdown, or for the terminal")
    table.add_argument("file", type=Path)
    table.add_argument("--terminal", action="store_true", help="metrics down, targets across")
    table.set_defaults(run=_table)
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _table(args: argparse.Namespace) -> int:
    run = results.read(args.file)
    if args.terminal:
        results.show(run)
    else:
        print(results.markdown(run), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
