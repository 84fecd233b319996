"""`kvjax pull`: fetches a model ahead of its first use."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from kvjax.models.checkpoint import open_checkpoint
from kvjax.models.pull import NAMED_MODELS, pull

HELP = "fetch a model into the cache"
EPILOG = """\
NAME is a name that `kvjax models` lists, or a hub id such as org/name. The path of what was fetched
goes to standard output. What is there already is not fetched again.

examples:
  kvjax pull smollm2-135m
  kvjax pull smollm2-135m --verify
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("name", metavar="NAME", help="a named model or a hub id")
    parser.add_argument("--verify", action="store_true", help="compute the checksum anew")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    print(_pull_named(args) if args.name in NAMED_MODELS else open_checkpoint(args.name).path)
    return 0


def _pull_named(args: argparse.Namespace) -> Path:
    columns = (TextColumn(args.name), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), disable=args.quiet) as progress:
        task = progress.add_task(args.name, total=NAMED_MODELS[args.name].num_bytes)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        path = pull(args.name, verify=args.verify, progress=show)
        show(NAMED_MODELS[args.name].num_bytes, NAMED_MODELS[args.name].num_bytes)
    return path
