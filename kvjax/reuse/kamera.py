"""Kamera (arXiv 2606.23581): a chunk's KV is corrected by a low-rank patch, and no token is run.

What a chunk's KV lacks when it was computed alone is spread over its tokens but of low rank over
channels, and grows with depth. A patch is the truncated SVD of the difference between the KV behind
given antecedents and the KV alone, layer by layer, keys and values side by side; it is added before
keys are turned, so it moves with the chunk. It is made ahead of time, by one joint encoding.

A patch serves its own antecedents only: one made behind others is worse than none.
Antecedents are a set: the same chunks in another order, behind the same text, share a patch.
Of the paper only the abstract and notes of others were available. Inferred: the text between chunks
is part of what a patch is bound to; the SVD is of the plain difference, keys and values unweighted.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import numpy as np

from kvjax.cache.chunks import Variant
from kvjax.reuse.pieces import pieces_before
from kvjax.reuse.strategy import (
    KV,
    CanonicalChunks,
    Found,
    Hit,
    KVPatch,
    Prompt,
    Tokens,
    count_of,
)


@dataclasses.dataclass(frozen=True)
class Kamera(CanonicalChunks):
    """Patches of `rank`, where one was made for exactly the antecedents of a hit.

    Args:
      rank: of a patch in every layer from `shallow` on; the effect begins at 8 to 16 and is
        complete at about 32 in the paper, on models of larger width.
      shallow: layers at the bottom that get none.
      orbit: orders of the antecedents whose patches are averaged, the given order among them; all
        of them if there are no more. 1: the given order alone.
      without: what becomes of a chunk that has antecedents and no patch for them: "shift" reuses
        its KV as it is, "compute" computes it like any text.
    """

    name: ClassVar[str] = "kamera"
    rank: int = 16
    shallow: int = 0
    orbit: int = 1
    without: Literal["shift", "compute"] = "shift"

    def __post_init__(self) -> None:
        count_of("rank", self.rank, 1)
        count_of("shallow", self.shallow)
        count_of("orbit", self.orbit, 1)
        if self.without not in ("shift", "compute"):
            raise ValueError(f"without must be 'shift' or 'compute', got {self.without!r}")

    @property
    def patch_shapes(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        """One rank for all."""
        return (((self.rank,), "source"),)

    def wanted(self, prompt: Prompt, number: int, found: Found) -> Tokens | None:
        """The canonical variant, unless it would not be used."""
        return () if self.without == "shift" or not antecedents(prompt, number) else None

    def look_up(self, prompt: Prompt, number: int, found: Found) -> Variant | None:
        """The canonical variant."""
        variant = super().look_up(prompt, number, found)
        if variant is None or self.without == "shift":
            return variant
        bound = antecedents(prompt, number)
        return variant if not bound or self.patch_key(bound) in variant.facts else None

    def patch(self, prompt: Prompt, hit: Hit, hits: Sequence[Hit], found: Found) -> KVPatch | None:
        """The patch made for the hit's antecedents; None if there is none for exactly them."""
        bound = antecedents(prompt, hit.number)
        return hit.variant.facts.get(self.patch_key(bound)) if bound else None

    def patch_key(self, bound: str) -> str:
        """Under which a variant's `facts` hold the patch for the antecedents `bound`."""
        return f"kamera:{self.rank}:{self.shallow}:{self.orbit}:{bound}"


def antecedents(prompt: Prompt, number: int) -> str:
    """What a chunk of a prompt stands behind: a hash of the chunks as a set, and of the text as it
    stands; "" for the first thing in a prompt."""
    pieces = pieces_before(prompt, number)
    chunks = sorted(piece.name for piece in pieces if piece.is_chunk)
    text = [piece.name for piece in pieces if not piece.is_chunk]
    if not chunks and not text[0]:
        return ""
    return "+".join(chunks) + "|" + "+".join(text)


def low_rank_patch(alone: KV, behind: KV, rank: int, shallow: int = 0) -> KVPatch:
    """The best patch of `rank` that makes `alone` into `behind`, both at positions from 0.

    Layers below `shallow`, and singular values beyond a layer's own rank, are zeros.
    """
    deltas = [b - a for a, b in zip(alone, behind, strict=True) if a is not None and b is not None]
    layers, tokens, heads, _ = deltas[0].shape
    widths = [delta.shape[3] for delta in deltas]
    joined = np.concatenate([delta.reshape(layers, tokens, -1) for delta in deltas], axis=2)
    left = np.zeros((layers, tokens, rank), np.float32)
    right = np.zeros((layers, rank, joined.shape[2]), np.float32)
    for layer in range(shallow, layers):
        u, s, vt = np.linalg.svd(joined[layer], full_matrices=False)
        kept = min(rank, len(s))
        left[layer, :, :kept] = u[:, :kept] * s[:kept]
        right[layer, :kept] = vt[:kept]
    at = heads * widths[0]
    k = right[:, :, :at].reshape(layers, rank, heads, widths[0])
    if len(widths) == 1:
        return KVPatch(k, None, left)
    return KVPatch(k, right[:, :, at:].reshape(layers, rank, heads, widths[1]), left, left)


def orders(count: int, most: int) -> Iterator[tuple[int, ...]]:
    """Up to `most` different orders of `count` things, the given one first; the same every time."""
    first = tuple(range(count))
    if math.factorial(count) <= most:
        yield from itertools.permutations(first)
        return
    drawn, source = {first: None}, random.Random(count)
    while len(drawn) < most:
        drawn[tuple(source.sample(first, count))] = None
    yield from drawn
