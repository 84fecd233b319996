"""Reuse of KV anywhere in a prompt: strategies over one plan, one chunk store, one forward.

A strategy is a small frozen value (`kvjax.reuse.strategy` says what it can do). The default,
`PrefixOnly`, reuses exact prefixes only; every other one is asked for.
"""

import dataclasses
import types
import typing
from typing import Any

from kvjax.errors import UnknownStrategy
from kvjax.reuse.cacheblend import CacheBlend
from kvjax.reuse.cacheclip import CacheClip
from kvjax.reuse.cachecraft import CacheCraft
from kvjax.reuse.cachetune import CacheTune
from kvjax.reuse.controls import Oracle, RandomTokens
from kvjax.reuse.epic import Epic
from kvjax.reuse.fusionrag import FusionRAG
from kvjax.reuse.hcache import HCache
from kvjax.reuse.kamera import Kamera
from kvjax.reuse.kvcomm import KVComm
from kvjax.reuse.kvshare import KVShare
from kvjax.reuse.naive import Naive, NaiveWithoutRotation
from kvjax.reuse.relaycaching import RelayCaching
from kvjax.reuse.strategy import Strategy
from kvjax.reuse.tablecache import TableCache

__all__ = [
    "STRATEGIES",
    "CacheBlend",
    "CacheClip",
    "CacheCraft",
    "CacheTune",
    "Epic",
    "FusionRAG",
    "HCache",
    "KVComm",
    "KVShare",
    "Kamera",
    "Naive",
    "NaiveWithoutRotation",
    "Oracle",
    "PrefixOnly",
    "RandomTokens",
    "RelayCaching",
    "Strategy",
    "TableCache",
    "parse",
]


class PrefixOnly(Strategy):
    """Exact prefix reuse, which the radix tree does by itself: chunks are ordinary text."""


# By the name that a spec begins with; one from outside the package is one more entry.
STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (
        PrefixOnly, Naive, NaiveWithoutRotation, Epic, CacheBlend, FusionRAG, CacheTune,
        KVShare, CacheClip, CacheCraft, KVComm, Kamera, RelayCaching, TableCache, HCache,
        RandomTokens, Oracle,
    )
}  # fmt: skip


def parse(spec: "str | Strategy | None") -> Strategy:
    """A strategy from `name:option=value,option=value`; a strategy is returned as it is.

    Raises:
      UnknownStrategy: no strategy has that name, or it has no such option.
      ValueError: an option's value is not what it takes.
    """
    if spec is None:
        return PrefixOnly()
    if isinstance(spec, Strategy):
        return spec
    if not isinstance(spec, str):
        raise ValueError(f"reuse must be a spec or a Strategy, got {type(spec).__name__}")
    name, _, rest = spec.partition(":")
    kind = STRATEGIES.get(name)
    if kind is None:
        raise UnknownStrategy(f"no reuse strategy {name!r}; there are {sorted(STRATEGIES)}")
    options: dict[str, Any] = {}
    types_of = typing.get_type_hints(kind)
    fields = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    for item in filter(None, rest.split(",")):
        key, equals, text = (part.strip() for part in item.partition("="))
        if not equals or key not in fields:
            raise UnknownStrategy(f"{name} has no option {key!r}; it has {sorted(fields)}")
        options[key] = _value(f"{name}:{key}", types_of[key], text)
    return kind(**options)


def _value(name: str, kind: Any, text: str) -> Any:
    """`text` as an option's type."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in kinds and text == "None":
        return None
    for one in kinds:
        if one is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if one in (int, float):
            try:
                return one(text)
            except ValueError:
                continue
        if one is str or typing.get_origin(one) is typing.Literal:
            return text
    wanted = " or ".join(getattr(one, "__name__", str(one)) for one in kinds)
    raise ValueError(f"{name} must be {wanted}, got {text!r}")
