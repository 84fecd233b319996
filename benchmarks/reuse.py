"""Reuse strategies against the same model's full prefill, on the corpora; resumable.

Every item is measured under every method; each reading is kept at once. The table, its intervals
and the claims are made from the result file alone.
"""

import argparse
import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kvjax.benchmarks import corpora, manifest, results, reuse_methods, reuse_results, reuse_table
from kvjax.benchmarks.corpora import Corpus, Generate, Generation
from kvjax.benchmarks.reuse_reading import Instrument
from kvjax.benchmarks.reuse_results import ResultFile

QUICK_CORPORA, QUICK_ITEMS = ("lookup", "binding"), 4  # none whose messages are generated first
OpenInstrument = Callable[[argparse.Namespace], Instrument]
Tick = Callable[[str, int], None]  # (what is measured next, measurements done since the last)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `kvjax bench reuse`."""
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--corpora", nargs="+", metavar="NAME", help=", ".join(corpora.CORPORA))
    parser.add_argument(
        "--methods", nargs="+", metavar="SPEC", help=f"name or name:option=value,...; names: "
        f"{', '.join(reuse_methods.NAMES)}",
    )  # fmt: skip
    parser.add_argument("--items", type=int, help="of each corpus, the first; default all")
    parser.add_argument("--size", default="small", choices=tuple(corpora.SIZES))
    parser.add_argument("--split", default="held_out", choices=corpora.SPLITS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("bench-results/reuse.jsonl"))
    parser.add_argument("--resume", action="store_true", help="continue what OUTPUT holds")
    parser.add_argument("--quick", action="store_true", help="few methods, four items of two")
    parser.add_argument("--table", action="store_true", help="only show the table of OUTPUT")


def run(args: argparse.Namespace, open_instrument: OpenInstrument | None = None) -> int:
    """Measures what is missing, shows the table, writes it beside OUTPUT; 1 if anything failed.

    Raises `ValueError` for names that are not there, before anything is loaded.
    """
    if args.table:
        print(reuse_table.markdown(reuse_results.read(args.output)), end="")
        return 0
    names, specs, count = chosen(args)
    results.require_writable(args.output)
    if args.output.exists() and not args.resume:
        raise ValueError(f"{args.output} exists; --resume continues it")
    if open_instrument is None:
        measuring = importlib.import_module("kvjax.benchmarks.reuse_measure")
        open_instrument = measuring.open_instrument
    assert open_instrument is not None
    instrument = open_instrument(args)
    settings = {
        "split": args.split, "size": args.size, "seed": args.seed, "about": instrument.about(),
    }  # fmt: skip
    about = manifest.base("reuse")
    with ResultFile(args.output, settings, about, resume=args.resume) as file:
        built = [build(name, args, instrument, file) for name in names]
        measure(instrument, built, specs, count, file, show=sys.stderr.isatty())
        text = reuse_table.markdown(file.results)
        failed = bool(file.results.errors)
    args.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text, end="")
    return int(failed)


def chosen(args: argparse.Namespace) -> tuple[list[str], list[str], int | None]:
    """Corpora, methods and items of each that the arguments ask for, all checked."""
    possible = [
        name for name, source in corpora.CORPORA.items()
        if source.has_splits or args.split == "held_out"
    ]  # fmt: skip
    names = list(dict.fromkeys(args.corpora or (QUICK_CORPORA if args.quick else possible)))
    for name in names:
        if name not in corpora.CORPORA:
            raise ValueError(f"unknown corpus {name!r}; there are {', '.join(corpora.CORPORA)}")
        if name not in possible:
            raise ValueError(f"{name} has no split {args.split}: it is for reporting only")
    default = reuse_methods.QUICK if args.quick else reuse_methods.default(names)
    specs = reuse_methods.check(args.methods or default)
    if args.items is not None and args.items < 1:
        raise ValueError(f"--items must be at least 1, got {args.items}")
    return names, specs, args.items or (QUICK_ITEMS if args.quick else None)


def build(name: str, args: argparse.Namespace, instrument: Instrument, file: ResultFile) -> Corpus:
    """The corpus; messages that the file has are not generated again, others are kept in it."""
    corpus = corpora.build(
        name,
        split=args.split,
        size=args.size,
        seed=args.seed,
        generate=_remembering(instrument.generate, file),
    )
    file.note(f"corpus {name}", corpus.digest)
    return corpus


def measure(
    instrument: Instrument,
    built: Sequence[Corpus],
    specs: Sequence[str],
    count: int | None,
    file: ResultFile,
    *,
    show: bool = False,
) -> None:
    """Measures every pair of item and method that the file lacks, item by item."""
    plan = [(corpus, _wanted(corpus, specs, count)) for corpus in built]
    readings = file.results.readings
    total = sum(len(wanted) for _, wanted in plan)
    done = sum((c.name, *pair) in readings for c, wanted in plan for pair in wanted)
    with _progress(show, done, total) as tick:
        for corpus, wanted in plan:
            missing = [pair for pair in wanted if (corpus.name, *pair) not in readings]
            for pairs in _passes(instrument, missing):
                tick(f"{corpus.name}: stores", 0)
                instrument.begin(corpus, list(dict.fromkeys(spec for _, spec in pairs)))
                _measure_pass(instrument, corpus, pairs, file, tick)


def _measure_pass(
    instrument: Instrument,
    corpus: Corpus,
    pairs: Sequence[tuple[str, str]],
    file: ResultFile,
    tick: Tick,
) -> None:
    items = {item.id: item for item in corpus.items}
    for item_id, spec in pairs:
        what = f"{corpus.name}: {reuse_methods.title(spec)}"
        tick(what, 0)
        key = (corpus.name, item_id, spec)
        try:
            reading = instrument.measure(items[item_id], spec)
        except Exception as error:  # one method's failure is a row, not the end of the run
            file.fail(key, error)
        else:
            file.add(key, reading)
        tick(what, 1)


def _passes(
    instrument: Instrument, pairs: Sequence[tuple[str, str]]
) -> list[list[tuple[str, str]]]:
    """The pairs that one filling of the stores serves: every method that learns by itself."""
    passes: dict[str, list[tuple[str, str]]] = {"": []}  # first, whatever a resumed run lacks
    for item_id, spec in pairs:
        passes.setdefault(spec if instrument.learns(spec) else "", []).append((item_id, spec))
    return [some for some in passes.values() if some]


def _wanted(corpus: Corpus, specs: Sequence[str], count: int | None) -> list[tuple[str, str]]:
    """(item, method) in the order of measuring."""
    return [
        (item.id, spec)
        for item in corpus.items[:count]
        for spec in specs
        if reuse_methods.applies(spec, corpus.name)
    ]


def _remembering(generate: Generate, file: ResultFile) -> Generate:
    def remembered(prompts: Sequence[str], max_tokens: int) -> list[Generation]:
        known = file.results.generations
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if new:
            file.keep(new, generate(new, max_tokens))
        return [known[prompt] for prompt in prompts]

    return remembered


@contextlib.contextmanager
def _progress(show: bool, done: int, total: int) -> Iterator[Tick]:
    """A bar on standard error that counts measurements, those of earlier runs included."""
    if not show:
        yield lambda _what, _count: None
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total, completed=done)
        yield lambda what, count: progress.update(task, description=what, advance=count)
