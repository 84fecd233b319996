"""The methods of the reuse table, by their specs: a strategy's name and its options.

A spec is `name` or `name:option=value,option=value`, as `kvjax generate --reuse` takes it. The
names `full` to `oracle` of the first rows are controls. A sink of 1 is the token that begins the
prompts of SmolLM2.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence

AGENT_CORPORA = ("agents", "relay")
TABLE_CORPORA = ("schema", "sql")


@dataclasses.dataclass(frozen=True, slots=True)
class Method:
    """A row of the table. `corpora` None: all of them."""

    spec: str
    title: str
    corpora: tuple[str, ...] | None = None


METHODS = (
    Method("full", "full prefill"),
    Method("prefix", "prefix cache"),
    Method("naive_no_rotation", "naive, positions wrong"),
    Method("naive", "naive, re-rotated"),
    Method("random:ratio=0.05", "random 5 %"),
    Method("random:ratio=0.15", "random 15 %"),
    Method("random:ratio=0.3", "random 30 %"),
    Method("epic:k=0,sink=1", "EPIC-0 (dummies)"),
    Method("epic:k=4", "EPIC-4"),
    Method("epic:k=16", "EPIC-16"),
    Method("epic:k=32", "EPIC-32"),
    Method("epic:k=16,head=true", "EPIC-16, behind the head"),
    Method("cacheblend:ratio=0.05", "CacheBlend 5 %"),
    Method("cacheblend:ratio=0.15", "CacheBlend 15 %"),
    Method("cacheblend:ratio=0.2", "CacheBlend 20 %"),
    Method("cacheblend:ratio=0.3", "CacheBlend 30 %"),
    Method("cacheblend:ratio=0.15,head=true", "CacheBlend 15 %, behind the head"),
    Method("cacheblend:ratio=0.15,mask=bottom_right", "CacheBlend 15 %, bottom-right mask"),
    Method("cachecraft:ratio=0.15", "Cache-Craft 15 %"),
    Method("cachecraft:ratio=0.3", "Cache-Craft 30 %"),
    Method("fusionrag:ratio=0", "FusionRAG 0 %"),
    Method("fusionrag:ratio=0.05", "FusionRAG 5 %"),
    Method("fusionrag:ratio=0.15", "FusionRAG 15 %"),
    Method("fusionrag:ratio=0.15,neighbours=0", "FusionRAG 15 %, not enriched"),
    Method("cacheclip:ratio=0.2", "CacheClip 20 %"),
    Method("cachetune:ratio=0.15", "CacheTune 15 %"),
    Method("kvshare:ratio=0.15", "KVShare 15 %"),
    Method("kvcomm:anchors=20", "KVCOMM, 20 anchors", AGENT_CORPORA),
    Method("relaycaching", "RelayCaching", AGENT_CORPORA),
    Method("kamera:rank=4", "Kamera, rank 4"),
    Method("kamera:rank=16", "Kamera, rank 16"),
    Method("kamera:rank=32", "Kamera, rank 32"),
    Method("tablecache", "TableCache, foreign keys", TABLE_CORPORA),
    Method("tablecache:parents=random", "TableCache, random parents", TABLE_CORPORA),
    Method("hcache", "HCache"),
    Method("oracle:ratio=0.15", "oracle 15 %"),
)
QUICK = ("full", "naive_no_rotation", "naive", "random:ratio=0.15", "epic:k=16",
         "cacheblend:ratio=0.15")  # fmt: skip
BY_SPEC = {method.spec: method for method in METHODS}
NAMES = tuple(dict.fromkeys(method.spec.partition(":")[0] for method in METHODS))
_OPTIONS = re.compile(r"[a-z_]+=[\w.+-]+(,[a-z_]+=[\w.+-]+)*")


def check(specs: Sequence[str]) -> list[str]:
    """The specs without repetition, in the table's order, others (new options) behind.

    Raises `ValueError` with the list for a name that is not there or malformed options. Whether a
    strategy has an option is its own to say.
    """
    for spec in specs:
        name, colon, options = spec.partition(":")
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, 1)
            meant = f", meant {near[0]!r}?" if near else ""
            raise ValueError(f"unknown method {name!r}{meant}; there are {', '.join(NAMES)}")
        if colon and not _OPTIONS.fullmatch(options):
            raise ValueError(f"method {spec!r}: expected {name}:option=value,option=value")
    order = list(BY_SPEC)
    known = sorted({spec for spec in specs if spec in BY_SPEC}, key=order.index)
    return known + [spec for spec in dict.fromkeys(specs) if spec not in BY_SPEC]


def default(corpora: Iterable[str]) -> list[str]:
    """Specs of the methods that are for one of the corpora."""
    return [m.spec for m in METHODS if any(applies(m.spec, corpus) for corpus in corpora)]


def applies(spec: str, corpus: str) -> bool:
    """Whether a method is for this corpus; one with options of its own goes by its name."""
    method = BY_SPEC.get(spec) or next(
        m for m in METHODS if m.spec.partition(":")[0] == spec.partition(":")[0]
    )
    return method.corpora is None or corpus in method.corpora


def title(spec: str) -> str:
    """How the table names a method."""
    return BY_SPEC[spec].title if spec in BY_SPEC else spec
