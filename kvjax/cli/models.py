"""`kvjax models`: what is supported, and what is cached here."""

import argparse

from rich.console import Console
from rich.table import Table

from kvjax.cli.options import show_size
from kvjax.models import FAMILIES
from kvjax.models.checkpoint import FORMATS
from kvjax.models.pull import NAMED_MODELS, cached_models
from kvjax.models.tokenizers import TOKENIZERS

HELP = "list supported and cached models"
EPILOG = """\
A MODEL of the other commands is a name from the first table, a folder (Hugging Face or written by
`kvjax convert`), a .gguf file, or a hub id whose config.json has a model_type of the second table.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no flags."""


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    cached = {model.name for model in cached_models()}
    named = Table("name", "size", "cached", "what", title="named models", title_justify="left")
    for name, model in NAMED_MODELS.items():
        here = "yes" if name in cached else f"kvjax pull {name}"
        what = f"{model.description} ({model.licence})"
        named.add_row(name, show_size(model.num_bytes), here, what)
    families = Table("model_type", "notes", title="families", title_justify="left")
    for model_type, family in FAMILIES.items():
        families.add_row(model_type, family.note)
    console = Console()
    console.print(named)
    console.print(families)
    console.print(f"weights: {', '.join(FORMATS)}; tokenizers: {', '.join(TOKENIZERS)}")
    return 0
