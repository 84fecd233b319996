"""What papers claim about the order of methods, and whether a result confirms or refutes it.

A claim is an inequality between means of readings: a weighted sum plus a constant that is negative
where the claim holds. Its paired bootstrap interval decides: all below zero confirms, all above
refutes, else it is undecided.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from kvjax.benchmarks import intervals, reuse_methods
from kvjax.benchmarks.intervals import Array, Interval
from kvjax.benchmarks.reuse_reading import Reading
from kvjax.benchmarks.reuse_results import Results


def u_excess(reading: Reading) -> float:
    """KV deviation of the outer thirds of the layers (the larger mean) over the middle third's."""
    parts = np.array_split(np.array(reading.kv_deviation), 3)
    first, middle, last = (float(part.mean()) for part in parts)
    return max(first, last) - middle


METRICS: dict[str, Callable[[Reading], float]] = {
    "KL_ans": lambda r: r.kl_answer,
    "KVdev mid": lambda r: r.kv_middle,
    "KVdev early": lambda r: r.kv_early,
    "computed share": lambda r: r.computed_share,
    "bytes/token": lambda r: r.stored_bytes_per_token,
    "outer KVdev less middle": u_excess,
    "decode KVdev": lambda r: r.extra["decode_kv_deviation"],
}


@dataclasses.dataclass(frozen=True, slots=True)
class Term:
    """`weight` times the mean of a metric over a method's readings."""

    weight: float
    metric: str
    method: str


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """`sum(terms) + constant < 0`, on each of `corpora` (None: all that were measured)."""

    text: str
    source: str
    terms: tuple[Term, ...]
    corpora: tuple[str, ...] | None = None
    constant: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """A claim on a corpus: its statistic, None where a method was not measured."""

    text: str
    source: str
    corpus: str
    formula: str
    value: Interval | None

    @property
    def verdict(self) -> str:
        """confirmed, refuted, undecided or not measured."""
        if self.value is None:
            return "not measured"
        if self.value.high < 0:
            return "confirmed"
        return "refuted" if self.value.low > 0 else "undecided"


def less(a: str, b: str, metric: str = "KL_ans", share: float = 1.0) -> tuple[Term, ...]:
    """The terms of: a's mean is less than `share` of b's."""
    return Term(1, metric, a), Term(-share, metric, b)


_RANDOM, _BLEND, _EPIC = "random:ratio=0.15", "cacheblend:ratio=0.15", "epic:k=16"
_FUSION, _NO_NEIGHBOURS = "fusionrag:ratio=0", "fusionrag:ratio=0.15,neighbours=0"
_AGENTS = reuse_methods.AGENT_CORPORA
CLAIMS = (
    Claim("re-rotation beats wrong positions", "all", less("naive", "naive_no_rotation")),
    Claim("15 % highest-deviation tokens lower KV deviation", "CacheBlend",
          less(_BLEND, "naive", "KVdev mid")),
    Claim("15 % highest-deviation tokens beat naive", "CacheBlend", less(_BLEND, "naive")),
    Claim("the mask by position is no worse than bottom-right", "this work",
          less(_BLEND, "cacheblend:ratio=0.15,mask=bottom_right")),
    Claim("random recompute is worse than naive", "Cache-Craft", less("naive", _RANDOM)),
    Claim("enrichment halves early KV deviation", "FusionRAG",
          less(_FUSION, "naive", "KVdev early", share=0.5)),
    Claim("enriched at 0 % beats CacheBlend 15 %", "FusionRAG", less(_FUSION, _BLEND), ("lookup",)),
    Claim("query-guided beats query-agnostic at 15 %", "FusionRAG", less(_NO_NEIGHBOURS, _BLEND)),
    Claim("query-aware beats query-agnostic at 20 %", "CacheClip",
          less("cacheclip:ratio=0.2", "cacheblend:ratio=0.2")),
    Claim("first 16 tokens lose at most 10 points of recovery to CacheBlend 15 %", "EPIC",
          (*less(_EPIC, _BLEND), Term(-0.1, "KL_ans", "naive")), ("lookup", "binding")),
    Claim("first 16 tokens cost less than CacheBlend 15 %", "EPIC",
          less(_EPIC, _BLEND, "computed share")),
    Claim("removing sinks gives half of the gain of 16 tokens", "EPIC-0, CacheClip",
          (Term(1, "KL_ans", "epic:k=0,sink=1"), Term(-0.5, "KL_ans", "naive"),
           Term(-0.5, "KL_ans", _EPIC))),
    Claim("chunks encoded behind the prompt's head lose less", "this work",
          less("cacheblend:ratio=0.15,head=true", _BLEND)),
    Claim("a rank-16 patch recovers 90 % of binding", "Kamera",
          less("kamera:rank=16", "naive", share=0.1), ("binding",)),
    Claim("a rank-32 patch recovers 90 % of binding", "Kamera",
          less("kamera:rank=32", "naive", share=0.1), ("binding",)),
    Claim("weighted offsets of anchors beat naive", "KVCOMM",
          less("kvcomm:anchors=20", "naive"), _AGENTS),
    Claim("KV from decoding is that of prefill", "RelayCaching",
          (Term(1, "decode KVdev", "relaycaching"),), _AGENTS, constant=-1e-4),
    Claim("KV deviates most in the middle layers", "RelayCaching",
          (Term(1, "outer KVdev less middle", "naive"),), _AGENTS),
    Claim("rectifying recovers 80 %", "RelayCaching",
          less("relaycaching", "naive", share=0.2), _AGENTS),
    Claim("rectifying computes under 20 %", "RelayCaching",
          (Term(1, "computed share", "relaycaching"),), _AGENTS, constant=-0.2),
    Claim("foreign-key context beats independent tables", "TableCache",
          less("tablecache", "naive"), ("schema", "sql")),
    Claim("random parents do not do as well", "TableCache",
          less("tablecache", "tablecache:parents=random"), ("schema", "sql")),
    Claim("restoring from hidden states is exact", "HCache",
          (Term(1, "KL_ans", "hcache"),), constant=-1e-6),
    Claim("under grouped queries hidden states are larger than KV", "HCache",
          less("naive", "hcache", "bytes/token")),
)  # fmt: skip


def findings(results: Results) -> list[Finding]:
    """Every claim on every corpus it is about."""
    found = [
        Finding(claim.text, claim.source, corpus, formula(claim), evaluate(results, corpus, claim))
        for claim in CLAIMS
        for corpus in (claim.corpora or results.corpora)
    ]
    return [*found, single_hop_survives(results), *reach(results)]


def evaluate(results: Results, corpus: str, claim: Claim) -> Interval | None:
    """The claim's statistic; None where a term has no reading (or lacks its further number)."""
    columns = [(term.method, METRICS[term.metric]) for term in claim.terms]
    try:
        rows = results.paired(corpus, columns)
    except KeyError:  # of Reading.extra
        return None
    if rows is None:
        return None
    weights = [term.weight for term in claim.terms]

    def total(*means: Array) -> Array:
        return sum((w * m for w, m in zip(weights, means, strict=True)), np.array(claim.constant))

    return intervals.statistic(total, *rows)


def formula(claim: Claim) -> str:
    """The statistic in words, as `KL_ans(a) - 0.5 KL_ans(b)`."""
    parts: list[str] = []
    for term in claim.terms:
        sign = "- " if term.weight < 0 else "+ " if parts else ""
        factor = "" if abs(term.weight) == 1 else f"{abs(term.weight):g} "
        parts.append(f"{sign}{factor}{term.metric}({reuse_methods.title(term.method)})")
    if claim.constant:
        parts.append(f"{'-' if claim.constant < 0 else '+'} {abs(claim.constant):g}")
    return " ".join(parts)


def single_hop_survives(results: Results) -> Finding:
    """Naive reuse loses less on lookup than on binding (Kamera); the corpora are not paired."""
    rows = [[r.kl_answer for r in results.of(c, "naive").values()] for c in ("lookup", "binding")]
    value = intervals.unpaired_difference(*rows) if all(rows) else None
    return Finding("one hop survives naive reuse, binding does not", "Kamera", "lookup, binding",
                   "KL_ans(naive on lookup) - KL_ans(naive on binding)", value)  # fmt: skip


def reach(results: Results) -> list[Finding]:
    """The best method that recomputes 15 % recovers 80 % on lookup and 60 % on binding.

    The best is found on the same items, which flatters it a little.
    """
    found: list[Finding] = []
    for corpus, share in (("lookup", 0.8), ("binding", 0.6)):
        best = _best(results, corpus, _fifteen(results.methods(corpus)))
        terms = less(best, "naive", share=round(1 - share, 2)) if best else ()
        claim = Claim(f"the best at 15 % recovers {share:.0%}", "this work", terms)
        value = evaluate(results, corpus, claim) if best else None
        found.append(Finding(claim.text, claim.source, corpus, formula(claim), value))
    return found


def _fifteen(methods: Sequence[str]) -> list[str]:
    strategies = (m for m in methods if not m.startswith(("random", "oracle")))
    return [m for m in strategies if "ratio=0.15" in m.partition(":")[2].split(",")]


def _best(results: Results, corpus: str, methods: Sequence[str]) -> str | None:
    means = {
        m: float(np.mean([r.kl_answer for r in readings.values()]))
        for m in methods
        if (readings := results.of(corpus, m))
    }
    return min(means, key=means.__getitem__) if means else None
