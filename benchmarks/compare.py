"""`kvjax bench compare A B`: what changed between two results, and what is only noise.

Ratios are of means, B over A. Their intervals hold together: with 95 % confidence all of them cover
their true ratios (Bonferroni), so that a file with many figures does not raise false alarms. A
figure changed if its interval leaves out 1; it is a regression if it is worse by more than the
tolerance, too. A figure that was measured only once has no interval: the tolerance alone decides.
What was measured on named items (`bench reuse`) is compared item by item.
"""

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kvjax.benchmarks import samples
from kvjax.benchmarks.intervals import LEVEL, Interval
from kvjax.benchmarks.results import write_json
from kvjax.benchmarks.samples import Sample

RESAMPLES = 1_000
REGRESSION, WORSE, NOISE, BETTER = "regression", "worse, within tolerance", "within noise", "better"
_SAME = (  # of two manifests, or it is other work
    "workload", "sizes", "prompts", "model", "dtypes", "split", "size", "seed", "seeds", "dtype",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """One figure in both results. `ratio` is B's mean over A's, with nan bounds if unknown."""

    name: str
    unit: str
    a: float
    b: float
    ratio: Interval
    verdict: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `kvjax bench compare`."""
    parser.add_argument("a", type=Path, help="the result compared with")
    parser.add_argument("b", type=Path, help="the result that is judged")
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="share that a figure may get worse by (0.05)"
    )
    parser.add_argument("--only", default="", help="figures whose name has this in it")
    parser.add_argument("--json", type=Path, help="also write the verdicts to this file")
    parser.add_argument(
        "--unequal", action="store_true", help="compare although the two did different work"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the comparison; 1 if there is a regression.

    Raises `ValueError` for files that are no results, of different work, or with no common figure.
    """
    a, b = samples.read(args.a), samples.read(args.b)
    if not args.unequal:
        require_equal_work(a, b)
    of_a, of_b = samples.samples(a), samples.samples(b)
    names = [n for n in of_a if n in of_b and args.only in n]
    if not names:
        raise ValueError(f"{args.a} and {args.b} have no figure in common")
    verdicts = compare({n: (of_a[n], of_b[n]) for n in names}, args.tolerance)
    _print(verdicts, [n for n in (*of_a, *of_b) if (n in of_a) != (n in of_b)])
    if args.json is not None:
        write_json(args.json, [dataclasses.asdict(v) for v in verdicts])
    worse = [v.name for v in verdicts if v.verdict == REGRESSION]
    print(f"regressions beyond {args.tolerance:.0%}: {', '.join(worse) if worse else 'none'}")
    return int(bool(worse))


def compare(pairs: Mapping[str, tuple[Sample, Sample]], tolerance: float) -> list[Verdict]:
    """A verdict for each figure's two samples. Raises `ValueError` for a bad tolerance."""
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"--tolerance must be a number of at least 0, got {tolerance}")
    level = 1 - (1 - LEVEL) / len(pairs)
    found = []
    for name, (a, b) in pairs.items():
        between = paired_ratio(a, b, level) if a.items and b.items else None
        between = between or ratio(a.values, b.values, level)
        verdict = judge(between, a.higher_is_better, tolerance)
        means = (float(np.mean(a.values)), float(np.mean(b.values)))
        found.append(Verdict(name, a.unit, *means, between, verdict))
    return found


def judge(between: Interval, higher_is_better: bool, tolerance: float) -> str:
    """One of the four verdicts on a ratio."""
    known = math.isfinite(between.low)
    if known and between.low <= 1 <= between.high:
        return NOISE
    loss = 1 / between.value - 1 if higher_is_better else between.value - 1  # in time
    if loss > tolerance:
        return REGRESSION
    if not known and loss >= -tolerance:
        return NOISE
    return WORSE if loss > 0 else BETTER


def ratio(a: Sequence[float], b: Sequence[float], level: float = LEVEL) -> Interval:
    """mean(b) / mean(a) of two independent samples of positive values, and its interval.

    The standard error of each mean's logarithm is a bootstrap's, widened by n / (n - 1); the
    quantile is Student's with Welch's degrees of freedom, because a handful of rounds is usual here
    and percentiles of so few are too narrow. Bounds are nan where a sample has a single value.
    """
    value = float(np.mean(b) / np.mean(a))
    if min(len(a), len(b)) < 2:
        return Interval(value, float("nan"), float("nan"))
    variances = np.array([_variance(a, 0), _variance(b, 1)])
    total = variances.sum()
    if total == 0:
        return Interval(value, value, value)
    freedom = total**2 / (variances**2 / [len(a) - 1, len(b) - 1]).sum()
    half = _student(level, freedom) * math.sqrt(total)
    return Interval(value, value * math.exp(-half), value * math.exp(half))


def paired_ratio(a: Sample, b: Sample, level: float = LEVEL) -> Interval | None:
    """The same over the items that both have, whose differences between each other cancel.

    None if they have no item in common.
    """
    of_a, of_b = (
        dict(zip(a.items, a.values, strict=True)),
        dict(zip(b.items, b.values, strict=True)),
    )
    common = [item for item in of_a if item in of_b]
    if not common:
        return None
    rows = np.array([[of_a[i] for i in common], [of_b[i] for i in common]], np.float64)
    floor = max(a.floor, b.floor, 1e-12)

    def log_ratio(means: np.ndarray) -> np.ndarray:
        low, high = np.maximum(means, floor)
        return np.log(high / low)

    value = float(np.exp(log_ratio(rows.mean(axis=1))))
    count = len(common)
    if count < 2:
        return Interval(value, float("nan"), float("nan"))
    draws = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    spread = log_ratio(rows[:, draws].mean(axis=2)).std() * math.sqrt(count / (count - 1))
    half = _student(level, count - 1) * float(spread)
    return Interval(value, value * math.exp(-half), value * math.exp(half))


def _variance(values: Sequence[float], seed: int) -> float:
    """Of the logarithm of the mean, by resampling; unbiased for few values."""
    row = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    blocks = min(RESAMPLES, -(-RESAMPLES * len(row) // 1_000_000))  # of at most some 8 MB
    draws = [rng.integers(len(row), size=(RESAMPLES // blocks, len(row))) for _ in range(blocks)]
    means = np.concatenate([row[draw].mean(axis=1) for draw in draws])
    return float(np.log(means).var() * len(row) / (len(row) - 1))


def _student(level: float, freedom: float) -> float:
    from scipy.stats import t  # jax requires scipy

    return float(t.ppf((1 + level) / 2, freedom))


def require_equal_work(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Raises `ValueError` if the two results are of different commands or different work."""
    commands = samples.command(a), samples.command(b)
    if commands[0] != commands[1]:
        raise ValueError(f"a result of {commands[0]} and one of {commands[1]} do not compare")
    of_a, of_b = ({**run, **run.get("manifest", {})} for run in (a, b))
    for key in [*_SAME, *(key for key in of_a if key.startswith("corpus "))]:
        if key in of_a and key in of_b and of_a[key] != of_b[key]:
            raise ValueError(
                f"different work: {key} is {of_a[key]} and {of_b[key]}; --unequal compares anyway"
            )


def _print(verdicts: Sequence[Verdict], left_out: Sequence[str]) -> None:
    table = Table(*("figure", "unit", "A", "B", "B/A", "interval", "verdict"))
    for v in verdicts:
        known = math.isfinite(v.ratio.low)
        interval = f"{v.ratio.low:.3f} .. {v.ratio.high:.3f}" if known else "one value"
        cells = (f"{v.a:.5g}", f"{v.b:.5g}", f"{v.ratio.value:.3f}")
        table.add_row(v.name, v.unit, *cells, interval, v.verdict)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
    if left_out:
        print(f"only in one of them: {', '.join(left_out)}")
