"""`kvjax convert`: any checkpoint -> an Orbax checkpoint that loads in every weight type."""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from kvjax.models.checkpoint import open_checkpoint
from kvjax.models.saving import SAVED_DTYPES, save_checkpoint

HELP = "write a model as an Orbax checkpoint"
EPILOG = """\
OUT_DIR holds the weights under Hugging Face's names, with checksums, the configuration and the
tokenizer. It must not exist yet, and appears whole or not at all.

examples:
  kvjax convert smollm2-135m ./smollm2 --dtype bfloat16
  kvjax chat ./smollm2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("model", metavar="MODEL", help="name, folder, .gguf file or hub id")
    parser.add_argument("folder", metavar="OUT_DIR", type=Path, help="where to write")
    parser.add_argument("--dtype", choices=SAVED_DTYPES, default="auto",
                        help="of the stored weights; auto (default): as they are")  # fmt: skip
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    checkpoint = open_checkpoint(args.model)
    columns = (TextColumn("tensors"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), disable=args.quiet) as progress:
        task = progress.add_task("tensors", total=len(checkpoint.tensors))
        folder = save_checkpoint(
            checkpoint,
            args.folder,
            dtype=args.dtype,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    print(folder, file=sys.stdout)
    return 0
