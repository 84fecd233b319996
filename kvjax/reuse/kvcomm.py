"""KVCOMM (arXiv 2510.12872, section on anchors; steps after the authors' code): messages that
agents share are corrected by what the same place of the prompt did to earlier messages.

A placeholder is a chunk's place in a template: the fixed text in front of it, and between the
chunks before. For each placeholder a pool of anchors is kept: messages that were computed there,
with the offset of their KV from their KV alone. A message that resembles few anchors clearly (the
entropy of its weights is low) is taken from the store, and offsets of the anchors, weighted token
by token, for keys and for values apart, are added; no token of it is run. If one message of a
prompt resembles none, the prompt is computed, and the message becomes an anchor.

Anchors lie with the chunk that they are of, in `Variant.arrays`, under the tenant's salt, and leave
with it. A message takes its KV in float32 on the host once, and once more per pool it is in.

Inferred: an agent and a placeholder are known by the text in front; messages are encoded alone,
not behind a chat header. Key offsets are taken before rotary positions of the prompt, at positions
within the chunk; the authors rotate first and subtract then. Two anchors at least must be as long
as a message; in their code one is enough if the pool has another, and passes whatever it is.
Not here: the text behind a placeholder is computed as any text is, where the authors correct it as
well (their `pf`).
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from kvjax.cache.chunks import Variant
from kvjax.reuse.anchors import (
    Age,
    gate_weights,
    interpolated,
    leaves,
    predictable,
    token_weights,
    top_p,
)
from kvjax.reuse.pieces import pieces_before
from kvjax.reuse.strategy import (
    KV,
    CanonicalChunks,
    Found,
    Hit,
    KVPatch,
    Observed,
    Prompt,
    ReadKV,
    Workbench,
    context_hash,
    count_of,
    ratio_of,
)

_ANCHOR = "kvcomm"  # fact: `{pool: Age}`, the oldest pool first
_DISTANCES = "kvcomm_distances"  # fact: `{chunk: L2 distance of values}`
_MOST_DISTANCES = 1024


@dataclasses.dataclass(frozen=True)
class KVComm(CanonicalChunks):
    """Offsets of up to `anchors` earlier messages at the same place.

    Args:
      anchors: of one placeholder, the paper's 20.
      gamma: entropy that the weights of a message may have, of that of equal weights; 0.3 in the
        paper. 0: every message is computed.
      window: of the anchors that came first, of which the least used leaves a full pool.
      top_p: anchors that make up this share of a message's weights count as used.
      temperature: of the weights of offsets.
      pools: in which one message may be an anchor; it leaves the first for the next.
    """

    name: ClassVar[str] = "kvcomm"
    anchors: int = 20
    gamma: float = 0.3
    window: int = 5
    top_p: float = 0.9
    temperature: float = 1.0
    pools: int = 8

    def __post_init__(self) -> None:
        for name in ("anchors", "window", "pools"):
            count_of(name, getattr(self, name), 1)
        ratio_of("gamma", self.gamma)
        ratio_of("top_p", self.top_p)
        number = isinstance(self.temperature, int | float) and not isinstance(
            self.temperature, bool
        )
        if not number or not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be a number above 0, got {self.temperature!r}")

    @property
    def patch_shapes(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Dense ones."""
        return (((), "source"),)

    def annotate(self, variant: Variant, read: ReadKV) -> None:
        """Keeps a message's KV alone on the host, keys without any position."""
        if variant.key.context == context_hash(()) and "kvcomm:k" not in variant.arrays:
            _store(variant, "kvcomm", read())

    def look_up(self, prompt: Prompt, number: int, found: Found) -> Variant | None:
        """The message alone, if anchors speak for it and for every other one of the prompt."""
        at_start = prompt.segments[number].start == 0  # nothing in front: there is no offset
        if at_start or (not prompt.learns and self._all_predictable(prompt, found)):
            return super().look_up(prompt, number, found)
        return None

    def _all_predictable(self, prompt: Prompt, found: Found) -> bool:
        return all(
            self._weights(prompt, number, found) is not None
            for number, segment in enumerate(prompt.segments)
            if segment.start > 0 and segment.stop > prompt.num_exact
        )

    def _weights(
        self, prompt: Prompt, number: int, found: Found
    ) -> tuple[list[Variant], np.ndarray] | None:
        """Anchors as long as a message, and their weights; None if they do not speak for it."""
        message = super().look_up(prompt, number, found)
        if message is None or "kvcomm:k" not in message.arrays:
            return None
        pool = _pool(found, prompt.salt, placeholder(prompt, number))
        able = [a for a in pool if a.num_tokens >= message.num_tokens]
        if len(able) < 2:
            return None
        weights = gate_weights([_distance(message, anchor) for anchor in able])
        return (able, weights) if predictable(weights, self.gamma) else None

    def patch(self, prompt: Prompt, hit: Hit, hits: Sequence[Hit], found: Found) -> KVPatch | None:
        """Interpolated offsets of keys and values."""
        spoken = self._weights(prompt, hit.number, found)
        if spoken is None:
            return None  # it begins the prompt
        anchors, _ = spoken
        pool = placeholder(prompt, hit.number)
        k = self._offset(hit.variant, anchors, pool, "k")
        v = self._offset(hit.variant, anchors, pool, "v")
        assert k is not None
        origin = "+".join(anchor.key.chunk for anchor in anchors)
        return KVPatch(k, v, frame="source", origin=origin)

    def _offset(
        self, message: Variant, anchors: Sequence[Variant], pool: str, kind: str
    ) -> np.ndarray | None:
        if f"kvcomm:{kind}" not in message.arrays:  # a latent has no values
            return None
        alone = [anchor.arrays[f"kvcomm:{kind}"] for anchor in anchors]
        weights = token_weights(message.arrays[f"kvcomm:{kind}"], alone, self.temperature)
        return interpolated(weights, [a.arrays[f"kvcomm:{pool}:{kind}"] for a in anchors])

    def observe(self, observed: Observed, bench: Workbench) -> None:
        """Makes anchors of messages that none spoke for, and counts the use of those that did."""
        prompt = observed.prompt
        for number, segment in enumerate(prompt.segments):
            message = super().look_up(prompt, number, bench)
            if message is None or segment.start == 0 or "kvcomm:k" not in message.arrays:
                continue
            pool = placeholder(prompt, number)
            spoken = self._weights(prompt, number, bench)
            if not observed.exact and spoken is not None:
                anchors, weights = spoken
                for i in top_p(weights, self.top_p):
                    age = _age(anchors[i], pool)
                    anchors[i].facts[_ANCHOR][pool] = age._replace(uses=age.uses + 1)
                    bench.use(anchors[i])
            elif observed.exact and spoken is None and not _is_anchor(message, pool):
                within, alone = bench.read_prompt(segment.start, segment.stop), bench.read(message)
                self._add(message, pool, _difference(within, alone), bench)

    def _add(self, message: Variant, pool: str, offset: KV, found: Found) -> None:
        """Puts an anchor into its pool, which another may have to leave."""
        there = _pool(found, message.key.salt, pool)
        order = 1 + max((_age(anchor, pool).order for anchor in there), default=-1)
        message.facts.setdefault(_ANCHOR, {})[pool] = Age(order, 0)
        _store(message, f"kvcomm:{pool}", offset)
        if len(message.facts[_ANCHOR]) > self.pools:
            _remove(message, next(iter(message.facts[_ANCHOR])))
        there = _pool(found, message.key.salt, pool)
        while len(there) > self.anchors:
            ages = [_age(anchor, pool) for anchor in there]
            _remove(there.pop(leaves(ages, self.window)), pool)


def placeholder(prompt: Prompt, number: int) -> str:
    """The pool of a chunk's place: the text in front of it, whatever the chunks between hold."""
    pieces = pieces_before(prompt, number)
    return "+".join(piece.name for piece in pieces if not piece.is_chunk)


def _pool(found: Found, salt: str | None, pool: str) -> list[Variant]:
    return [variant for variant in found.of(salt) if _is_anchor(variant, pool)]


def _is_anchor(variant: Variant, pool: str) -> bool:
    return pool in variant.facts.get(_ANCHOR, {})


def _age(anchor: Variant, pool: str) -> Age:
    return Age(*anchor.facts[_ANCHOR][pool])  # plain, if it comes from a file


def _remove(variant: Variant, pool: str) -> None:
    del variant.facts[_ANCHOR][pool]
    for kind in ("k", "v"):
        variant.arrays.pop(f"kvcomm:{pool}:{kind}", None)


def _store(variant: Variant, name: str, kv: KV) -> None:
    for kind, array in zip(("k", "v"), kv, strict=True):
        if array is not None:
            variant.arrays[f"{name}:{kind}"] = array


def _difference(within: KV, alone: KV) -> KV:
    (k, v), (base_k, base_v) = within, alone
    return k - base_k, None if v is None or base_v is None else v - base_v


def _distance(message: Variant, anchor: Variant) -> float:
    """L2 distance of values over all layers, heads and tokens of the message (of keys for a
    latent). Kept with the message."""
    known: dict[str, float] = message.facts.setdefault(_DISTANCES, {})
    if anchor.key.chunk not in known:
        kind = "v" if "kvcomm:v" in message.arrays else "k"
        one, other = (variant.arrays[f"kvcomm:{kind}"] for variant in (message, anchor))
        if len(known) >= _MOST_DISTANCES:
            known.clear()
        known[anchor.key.chunk] = float(np.linalg.norm(one - other[:, : one.shape[1]]))
    return known[anchor.key.chunk]
