"""The `kvjax` command. One file per subcommand; `COMMANDS` lists them in the order of `--help`.

A command's module has `HELP` (one line), `EPILOG` (examples), `add_arguments(parser)` and
`run(args) -> exit status`. 0: done; 1: done, but some inputs failed; 2: could not be done, with one
line on standard error; 130: interrupted.
"""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Protocol

from kvjax import __version__
from kvjax.errors import KVJaxError

COMMANDS = (
    "generate",
    "chat",
    "serve",
    "pull",
    "models",
    "convert",
    "reuse",
    "info",
)  # modules beside this one

_DESCRIPTION = "LLM inference in JAX that computes the KV of a token once and reuses it."
_EPILOG = """\
examples:
  kvjax generate smollm2-135m examples/questions.jsonl -o answers.jsonl
  echo "The sea is" | kvjax generate smollm2-135m --max-tokens 20
  kvjax chat smollm2-135m --stats
  kvjax serve smollm2-135m --port 8000
  kvjax bench engine --help

KVJAX_CACHE_DIR moves the folder for models and compiled programs (default: ~/.cache/kvjax).
"""


class Command(Protocol):
    """What a module named in `COMMANDS` has."""

    HELP: str
    EPILOG: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


def parser() -> argparse.ArgumentParser:
    """The parser of every command but `bench`, which has its own."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="kvjax", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=raw
    )
    top.add_argument("--version", action="version", version=f"kvjax {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for name in COMMANDS:
        module: Command = importlib.import_module(f"kvjax.cli.{name}")  # type: ignore[assignment]
        sub = commands.add_parser(
            name, help=module.HELP, description=module.HELP, epilog=module.EPILOG,
            formatter_class=raw,
        )  # fmt: skip
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    commands.add_parser("bench", help="measure kvjax and its peers (kvjax bench --help)")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; usage errors exit with 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["bench"]:
            return importlib.import_module("kvjax.benchmarks.__main__").main(words[1:])
        args = parser().parse_args(words)
        _log_to_standard_error(quiet=getattr(args, "quiet", False))
        return args.run(args)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KVJaxError, ValueError, OSError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"kvjax: error: {why}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kvjax: interrupted", file=sys.stderr)
        return 130


def _log_to_standard_error(quiet: bool) -> None:
    log = logging.getLogger("kvjax")
    log.handlers = [h for h in log.handlers if h.get_name() != "kvjax-cli"]
    handler = logging.StreamHandler(sys.stderr)
    handler.set_name("kvjax-cli")
    handler.setFormatter(logging.Formatter("kvjax: %(message)s"))
    log.addHandler(handler)
    log.propagate = False  # libraries may have set up the root logger
    log.setLevel(logging.WARNING if quiet else logging.INFO)
