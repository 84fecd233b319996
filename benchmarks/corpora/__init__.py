"""What reuse is judged on: four synthetic corpora and four workloads, all seeded or fixed.

Adding a corpus: a function (split, size, seed) -> `Corpus`, or one that takes `generate` as well if
messages of the model are part of it, and a row in `CORPORA`.
"""

import dataclasses
from collections.abc import Callable

from kvjax.benchmarks.corpora import agents, binding, lookup, schema, workloads
from kvjax.benchmarks.corpora.item import (
    NUM_WARM_UP as NUM_WARM_UP,
)
from kvjax.benchmarks.corpora.item import (
    SIZES as SIZES,
)
from kvjax.benchmarks.corpora.item import (
    SPLITS as SPLITS,
)
from kvjax.benchmarks.corpora.item import Corpus as Corpus
from kvjax.benchmarks.corpora.item import Generate as Generate
from kvjax.benchmarks.corpora.item import Generation as Generation
from kvjax.benchmarks.corpora.item import Item as Item
from kvjax.benchmarks.corpora.item import Passage as Passage
from kvjax.benchmarks.corpora.item import Sharing as Sharing
from kvjax.benchmarks.corpora.item import check_split
from kvjax.benchmarks.corpora.item import digest as digest
from kvjax.benchmarks.corpora.item import sharing as sharing
from kvjax.benchmarks.corpora.item import solves as solves


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """How a corpus comes about: exactly one of `build` and `generated`."""

    title: str
    build: Callable[[str, str, int], Corpus] | None = None
    generated: Callable[[str, str, int, Generate], Corpus] | None = None
    has_splits: bool = True


CORPORA: dict[str, Source] = {
    "lookup": Source("C1, lookup", lookup.build),
    "binding": Source("C2, binding", binding.build),
    "agents": Source("C3, agents", generated=agents.build),
    "schema": Source("C4, schema", schema.build),
    "rag": Source("W2, shuffled passages", workloads.rag, has_splits=False),
    "relay": Source("W3, agents in turn", generated=workloads.relay, has_splits=False),
    "document": Source("W5, long document", workloads.document, has_splits=False),
    "sql": Source("W6, text to SQL", workloads.sql, has_splits=False),
}


def build(
    name: str,
    *,
    split: str = "held_out",
    size: str = "small",
    seed: int = 0,
    generate: Generate | None = None,
) -> Corpus:
    """The items of one corpus: the same for the same arguments (and generations), everywhere.

    Raises `ValueError` for a name, split or size that is not there, for the tuning split of a
    workload, and for a missing `generate` where messages of the model are needed.
    """
    if name not in CORPORA:
        raise ValueError(f"unknown corpus {name!r}; there are {', '.join(CORPORA)}")
    check_split(split)
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    source = CORPORA[name]
    if source.build is not None:
        return source.build(split, size, seed)
    assert source.generated is not None
    if generate is None:
        raise ValueError(f"{name} holds messages of the model: pass generate")
    return source.generated(split, size, seed, generate)
