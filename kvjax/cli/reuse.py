"""`kvjax reuse`: what approximate reuse of KV costs a model, measured and kept; a prompt drawn."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvjax.benchmarks import corpora, intervals, reuse_measure
from kvjax.benchmarks.corpora import Corpus
from kvjax.benchmarks.reuse_measure import EngineInstrument
from kvjax.benchmarks.reuse_reading import Reading
from kvjax.build import verdicts
from kvjax.cli import reuse_report
from kvjax.cli.options import add_engine, open_llm
from kvjax.reuse import STRATEGIES, Strategy, parse
from kvjax.reuse.gate import Limits, Verdict

HELP = "measure what reuse of KV costs a model, or draw what it does to a prompt"
EPILOG = """\
`check` compares each strategy with the model's own full prefill on prompts whose passages refer to
one another, and keeps the verdicts in the cache folder. A strategy may then serve this model with
these types whose mean KL divergence is at most --max-reuse-loss and that gets at least a share of
--min-reuse-agreement of the answers right that full prefill gets right; others are refused. (Where
full prefill has fewer than four right, tokens of its answers are counted instead.)
Exit status: 0 if all of them may, 1 if not.

`report` runs one prompt of a JSONL file, whose chunks are marked as in
  {"prompt": ["Read: ", {"chunk": "text"}, {"chunk": "text"}, "Who?"]}
and draws what became of each of its tokens, layer by layer, as a page of HTML (-o PAGE.html) or as
text. --measure compares with a full prefill.

examples:
  kvjax reuse check smollm2-135m --reuse epic:k=16 --reuse cacheblend:ratio=0.15
  kvjax reuse check smollm2-135m --items 8 --dtype float32
  kvjax reuse report smollm2-135m prompts.jsonl --reuse cacheblend --measure -o report.html
"""

CORPUS, ITEMS = "binding", 16
_LEAST_RIGHT = 4  # right answers of full prefill, for their share to mean anything
_CONTROLS = ("naive_no_rotation", "random", "oracle")  # to compare with, not to serve by


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.usage = "kvjax reuse {check,report} MODEL [INPUT] [options]"
    parser.add_argument("action", choices=("check", "report"))
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("input", metavar="INPUT", nargs="?", help="report: a JSONL file of prompts")
    parser.add_argument(
        "--items", type=int, default=ITEMS, metavar="N", help=f"check: prompts (default: {ITEMS})"
    )
    parser.add_argument(
        "--line", type=int, default=1, metavar="N", help="report: which prompt (default: 1)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="PAGE.html", help="report: default: text to stdout"
    )
    parser.add_argument(
        "--measure", action="store_true", help="report: the KV deviation from a full prefill"
    )
    add_engine(parser, reuse=False)  # there it is one spec
    parser.add_argument(
        "--reuse", action="append", metavar="SPEC", dest="specs",
        help="name or name:option=value,...; check: may be repeated; default: "
        + ", ".join(strategy.spec for strategy in _candidates()),
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.action == "report":
        return reuse_report.run(args, args.specs or [])
    if args.input is not None:
        raise ValueError(f"check has its own prompts, got {args.input!r}")
    chosen = [parse(spec) for spec in args.specs] if args.specs else _candidates()
    for strategy in chosen:
        if not strategy.approximate:
            raise ValueError(f"{strategy.spec} is exact: there is nothing to measure")
    if args.items < 1:
        raise ValueError(f"--items must be at least 1, got {args.items}")
    args.force_reuse = True
    llm = open_llm(args)
    corpus = corpora.build(CORPUS)
    instrument = EngineInstrument(llm, reuse_measure.about(llm, args.model))
    readings = measure(instrument, corpus, chosen, args.items, quiet=args.quiet)
    store = verdicts(llm.checkpoint, llm.engine.config)
    found = [verdict(instrument, corpus, strategy, readings) for strategy in chosen]
    for strategy, one in zip(chosen, found, strict=True):
        store.write(strategy, one)
    limits = Limits(args.max_reuse_loss, args.min_reuse_agreement)
    Console().print(table(found, limits))
    return int(any(one.complaint(limits) for one in found))


def measure(
    instrument: EngineInstrument, corpus: Corpus, chosen: list[Strategy], items: int, *, quiet: bool
) -> dict[str, list[Reading]]:
    """Readings of each strategy, of full prefill and of naive reuse, over the first `items` of a
    corpus."""
    specs = list(dict.fromkeys(["full", "naive", *(strategy.spec for strategy in chosen)]))
    instrument.begin(corpus, specs)
    readings: dict[str, list[Reading]] = {spec: [] for spec in specs}
    progress = Console(stderr=True)
    for item in track(
        corpus.items[:items], "measuring", console=progress,
        disable=quiet or not progress.is_terminal,
    ):  # fmt: skip
        for spec in specs:
            readings[spec].append(instrument.measure(item, spec))
    return readings


def verdict(
    instrument: EngineInstrument,
    corpus: Corpus,
    strategy: Strategy,
    readings: dict[str, list[Reading]],
) -> Verdict:
    """The verdict that readings of a strategy, of "full" and of "naive" make."""
    losses = [reading.kl_answer for reading in readings[strategy.spec]]
    naive = [reading.kl_answer for reading in readings["naive"]]
    mean = intervals.mean(losses)
    kept, counted = agreements(readings["full"], readings[strategy.spec])
    agreement = intervals.mean(kept)
    recovery = intervals.recovery(losses, naive).value if sum(naive) > 0 else None
    return Verdict(
        strategy=strategy.spec,
        loss=mean.value,
        loss_interval=(mean.low, mean.high),
        agreement=agreement.value,
        agreement_interval=(agreement.low, agreement.high),
        agreement_of=counted,
        recovery=recovery,
        corpus=corpus.name,
        corpus_digest=corpus.digest,
        items=len(losses),
        about=dict(instrument.about()),
    )


def agreements(full: list[Reading], other: list[Reading]) -> tuple[list[float], str]:
    """For each answer that full prefill has right whether `other` has it too, and what that is
    called; where there are too few, shares of the tokens of all answers."""
    right = [float(bool(b.solved)) for a, b in zip(full, other, strict=True) if a.solved]
    if len(right) >= _LEAST_RIGHT:
        return right, f"{len(right)} right answers"
    return [reading.agreement for reading in other], f"{len(other)} answers, by token"


def table(found: list[Verdict], limits: Limits) -> Table:
    """Losses, agreements and what they mean for serving."""
    shown = Table("strategy", "loss (nats/token)", "recovery", "answers kept", "may serve")
    for one in found:
        losses = f"{one.loss:.4f} ({one.loss_interval[0]:.4f}..{one.loss_interval[1]:.4f})"
        low, high = one.agreement_interval
        kept = f"{one.agreement:.1%} ({low:.1%}..{high:.1%})"
        recovery = "-" if one.recovery is None else f"{one.recovery:.1%}"
        complaint = one.complaint(limits)
        passes = "yes" if complaint is None else f"no: {complaint}"
        shown.add_row(one.strategy, losses, recovery, kept, passes)
    return shown


def _candidates() -> list[Strategy]:
    """Approximate strategies at their defaults."""
    return [s() for name, s in STRATEGIES.items() if s.approximate and name not in _CONTROLS]
