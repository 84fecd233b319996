"""The published table of a reuse result: a block per corpus, a row per method, then the claims."""

import dataclasses
from collections.abc import Callable, Sequence

from kvjax.benchmarks import corpora, intervals, reuse_claims, reuse_methods
from kvjax.benchmarks.intervals import Interval
from kvjax.benchmarks.reuse_reading import Reading
from kvjax.benchmarks.reuse_results import Results

HEADINGS = (
    "method", "KL_1 (nats)", "KL_ans (nats)", "recovery (%)", "Top1 (%)", "EM_rel (%)",
    "KVdev mid layer", "recomputed layer-tokens (%)", "stored bytes/token",
    "gold answer, Δlogp", "copied tokens", "prefill (ms)",
)  # fmt: skip
CONTROLS = ("full", "prefix", "naive_no_rotation", "naive", "random", "oracle")
EQUAL_BUDGET = 0.1  # shares of layer-tokens that may lie between a method and its random control


@dataclasses.dataclass(frozen=True, slots=True)
class AgainstRandom:
    """A method beside the random choice whose share of computed layer-tokens is nearest."""

    method: str
    control: str
    shares: tuple[float, float]
    difference: Interval  # of KL_ans

    @property
    def is_better(self) -> bool:
        """Whether the whole interval lies below zero."""
        return self.difference.high < 0


def markdown(results: Results) -> str:
    """Everything, for a README: what was measured, a table per corpus, claims, errors."""
    blocks = [provenance(results)]
    for corpus in results.corpora:
        blocks += corpus_blocks(results, corpus)
    blocks.append("### Claims")
    blocks.append(_claims(results))
    if results.errors:
        lines = (f"- {c} {i} {m}: {text}" for (c, i, m), text in results.errors.items())
        blocks.append("### Not measured\n\n" + "\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def corpus_blocks(results: Results, corpus: str) -> list[str]:
    """Heading, table, comparison with random, and further numbers of one corpus."""
    methods = [m for m in reuse_methods.check(results.methods(corpus)) if results.of(corpus, m)]
    count = len({item for c, item, _ in results.readings if c == corpus})
    against = {a.method: a for m in methods if (a := against_random(results, corpus, m))}
    title = corpora.CORPORA[corpus].title if corpus in corpora.CORPORA else corpus
    full = results.of(corpus, "full").values()
    solved = f", full prefill solves {sum(bool(r.solved) for r in full)} of {len(full)}"
    blocks = [f"### {title}: {count} items{solved if full else ''}"]
    lines = [_line(HEADINGS), _line(["---"] + ["---:"] * (len(HEADINGS) - 1))]
    for method in methods:
        name = reuse_methods.title(method)
        if (readings := len(results.of(corpus, method))) < count:
            name += f" ({readings} items)"
        if method in against and not against[method].is_better:
            name += " †"
        lines.append(_line([name, *cells(results, corpus, method)]))
    blocks.append("\n".join(lines))
    if against:
        blocks.append("\n".join(_against_line(a) for a in against.values()))
    if further := _further(results, corpus, methods):
        blocks.append(further)
    return blocks


def cells(results: Results, corpus: str, method: str) -> list[str]:
    """The row of a method, without its name; `-` is what is not defined for it."""
    readings = list(results.of(corpus, method).values())

    def mean(of: Callable[[Reading], float]) -> Interval:
        return intervals.mean([of(r) for r in readings])

    return [
        mean(lambda r: r.kl_1).text(4),
        mean(lambda r: r.kl_answer).text(4),
        recovery(results, corpus, method).text(1, 100),
        mean(lambda r: r.top1).text(1, 100),
        solved_again(results, corpus, method).text(1, 100),
        mean(lambda r: r.kv_middle).text(4),
        f"{100 * mean(lambda r: r.computed_share).value:.1f}",
        f"{mean(lambda r: r.stored_bytes_per_token).value:,.0f}",
        gold_loss(results, corpus, method).text(3),
        f"{mean(lambda r: r.copied_tokens).value:.0f}",
        mean(lambda r: r.prefill_s).text(1, 1000),
    ]


def recovery(results: Results, corpus: str, method: str) -> Interval:
    """1 - mean KL_ans(method) / mean KL_ans(naive) over the items that both have."""
    rows = results.paired(corpus, [(method, _kl), ("naive", _kl)])
    return _UNDEFINED if rows is None else intervals.recovery(*rows)


def solved_again(results: Results, corpus: str, method: str) -> Interval:
    """EM_rel: share of the items that full prefill solves which the method solves too."""
    full = results.of(corpus, "full")
    again = [
        float(bool(reading.solved))
        for item, reading in results.of(corpus, method).items()
        if item in full and full[item].solved
    ]
    return intervals.mean(again) if again else _UNDEFINED


def gold_loss(results: Results, corpus: str, method: str) -> Interval:
    """Mean log-probability of the gold answer less that under full prefill, in nats."""
    full = {i: r.gold_logprob for i, r in results.of(corpus, "full").items()}
    mine = {i: r.gold_logprob for i, r in results.of(corpus, method).items()}
    pairs = [(value, full.get(item)) for item, value in mine.items()]
    losses = [a - b for a, b in pairs if a is not None and b is not None]
    return intervals.mean(losses) if losses else _UNDEFINED


def against_random(results: Results, corpus: str, method: str) -> AgainstRandom | None:
    """The comparison at equal budget; None for controls and where no random row is near."""
    if method.partition(":")[0] in CONTROLS:
        return None
    share = _share(results, corpus, method)
    controls = [m for m in results.methods(corpus) if m.startswith("random:")]
    shares = {m: _share(results, corpus, m) for m in controls if results.of(corpus, m)}
    if not shares:
        return None
    control = min(shares, key=lambda m: abs(shares[m] - share))
    rows = results.paired(corpus, [(method, _kl), (control, _kl)])
    if rows is None or abs(shares[control] - share) > EQUAL_BUDGET:
        return None
    found = intervals.difference(*rows)
    return AgainstRandom(method, control, (share, shares[control]), found)


def provenance(results: Results) -> str:
    """Which model on which machine, which split, how the intervals are made."""
    known = results.manifest
    about = ", ".join(
        f"{name} {value}" for name, value in known["about"].items() if name != "engine"
    )
    machine = known.get("machine", {})
    return (
        f"Commit {known.get('commit', 'unknown')}, {known.get('started', 'unknown')}, "
        f"{machine.get('cpu', 'unknown CPU')}, {about}; split {known['split']}, "
        f"size {known['size']}, seed {known['seed']}. Means over items with paired bootstrap "
        f"{intervals.LEVEL:.0%} intervals ({intervals.RESAMPLES:,} resamples, seed "
        f"{intervals.SEED}). Recovery is 1 - KL_ans / KL_ans of naive re-rotated; EM_rel is over "
        "the items that full prefill solves; † is no better than random tokens at equal budget."
    )


_UNDEFINED = Interval(float("nan"), float("nan"), float("nan"))


def _kl(reading: Reading) -> float:
    return reading.kl_answer


def _share(results: Results, corpus: str, method: str) -> float:
    shares = [reading.computed_share for reading in results.of(corpus, method).values()]
    return sum(shares) / len(shares)


def _against_line(against: AgainstRandom) -> str:
    mine, random = (f"{reuse_methods.title(m)}" for m in (against.method, against.control))
    share, other = (f"{100 * s:.1f} %" for s in against.shares)
    word = "better" if against.is_better else "worse" if against.difference.low > 0 else "no better"
    return (
        f"- {mine} ({share} computed) is {word} than {random} ({other}): KL_ans "
        f"{against.difference.text(4)}"
    )


def _further(results: Results, corpus: str, methods: Sequence[str]) -> str:
    lines: list[str] = []
    for method in methods:
        readings = list(results.of(corpus, method).values())
        for name in dict.fromkeys(name for reading in readings for name in reading.extra):
            values = [r.extra[name] for r in readings if name in r.extra]
            shown = intervals.mean(values).text(4)
            lines.append(f"- {reuse_methods.title(method)}, {name.replace('_', ' ')}: {shown}")
    return "\n".join(lines)


def _claims(results: Results) -> str:
    head = ("claim", "source", "corpus", "holds if negative", "value", "verdict")
    lines = [_line(head), _line(["---"] * len(head))]
    for finding in reuse_claims.findings(results):
        value = "-" if finding.value is None else finding.value.text(4)
        row = (finding.text, finding.source, finding.corpus, finding.formula, value)
        lines.append(_line([*row, finding.verdict]))
    return "\n".join(lines)


def _line(row: Sequence[str]) -> str:
    return "| " + " | ".join(row) + " |"
