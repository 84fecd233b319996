"""Kamera (arXiv 2606.23581): a chunk's KV is corrected by a low-rank patch, and no token is run.

What a chunk's KV lacks when it was computed alone is spread over its tokens but of low rank over
channels, and grows with depth. A patch is the truncated SVD of the difference between the KV behind
given antecedents and the KV alone, layer by layer, keys and values side by side; it is added before
keys are turned, so it moves with the chunk. It is made ahead of time, by one joint encoding.

A patch serves its own antecedents only: one made behind others is worse than none.
Antecedents are a set: the same chunks in another order, behind the same text, share a patch.
Of the paper only the abstract and notes of others were available. Inferred: the text between chunks
is part of what a patch is bound to; the SVD is of the plain difference, keys and values unweighted;
when a patch is not worth its bytes.
"""

import dataclasses
import hashlib
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from kvjax.cache.chunks import Variant
from kvjax.errors import ReuseRefused
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


class Antecedents(NamedTuple):
    """What a chunk stands behind: `tokens_hash` of the chunks in their order, and of the texts
    before each of them and before the chunk itself, "" for no text."""

    chunks: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def nothing(self) -> bool:
        """Whether the chunk is the first thing in its prompt."""
        return not self.chunks and not any(self.texts)

    @property
    def key(self) -> str:
        """What a patch is bound to: the chunks as a set, the texts as they stand."""
        return "+".join(sorted(self.chunks)) + "|" + "+".join(self.texts)

    def __str__(self) -> str:
        return "+".join(self.chunks) + "|" + "+".join(self.texts)

    @classmethod
    def parse(cls, text: str) -> "Antecedents":
        """What `str` gave."""
        chunks, _, texts = text.partition("|")
        return cls(tuple(chunks.split("+")) if chunks else (), tuple(texts.split("+")))

    def left_of(self, before: "Antecedents") -> bool:
        """Whether these are what a sliding window left of `before`: the first chunks went, with the
        text behind each of them; the text in front of all stayed."""
        gone = len(before.chunks) - len(self.chunks)
        kept = before.texts[gone + 1 :]
        return gone > 0 and self == Antecedents(before.chunks[gone:], (before.texts[0], *kept))


def antecedents(prompt: Prompt, number: int) -> Antecedents:
    """What a chunk of a prompt stands behind."""
    pieces = pieces_before(prompt, number)
    return Antecedents(
        tuple(piece.name for piece in pieces if piece.is_chunk),
        tuple(piece.name for piece in pieces if not piece.is_chunk),
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
      most: a patch is not made that takes more than this times the bytes of the KV it corrects:
        then KV behind these antecedents may as well be stored, or the tokens run.
      window: whether a patch also serves a chunk whose antecedents are what a sliding window left
        of those it was made for: it goes on saying what has left. The paper lets survivors of a
        window be moved only; nothing is encoded again.
      without: what becomes of a chunk that has antecedents and no patch for them: "shift" reuses
        its KV as it is, "compute" computes it like any text, "refuse" fails the request.
    """

    name: ClassVar[str] = "kamera"
    rank: int = 16
    shallow: int = 0
    orbit: int = 1
    most: float = 1.0
    window: bool = False
    without: Literal["shift", "compute", "refuse"] = "shift"

    def __post_init__(self) -> None:
        count_of("rank", self.rank, 1)
        count_of("shallow", self.shallow)
        count_of("orbit", self.orbit, 1)
        number = isinstance(self.most, int | float) and not isinstance(self.most, bool)
        if not number or not self.most >= 0:
            raise ValueError(f"most must be a number of at least 0, got {self.most!r}")
        if not isinstance(self.window, bool):
            raise ValueError(f"window must be true or false, got {self.window!r}")
        if self.without not in ("shift", "compute", "refuse"):
            raise ValueError(
                f"without must be 'shift', 'compute' or 'refuse', got {self.without!r}"
            )

    @property
    def patch_shapes(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        """One rank for all."""
        return (((self.rank,), "source"),)

    def wanted(self, prompt: Prompt, number: int, found: Found) -> Tokens | None:
        """The canonical variant, unless it would not be used."""
        return None if self.without == "compute" and not _first(prompt, number) else ()

    def look_up(self, prompt: Prompt, number: int, found: Found) -> Variant | None:
        """The canonical variant, with or without a patch for it.

        Raises:
          ReuseRefused: there is none for these antecedents, and `without` is "refuse".
        """
        variant = super().look_up(prompt, number, found)
        if variant is None or self.without == "shift" or _first(prompt, number):
            return variant
        if self.patch_of(variant, prompt, number) is not None:
            return variant
        if self.without == "compute":
            return None
        others = sum(isinstance(fact, KVPatch) for fact in variant.facts.values())
        raise ReuseRefused(
            f"chunk {number + 1} of the prompt has no {self.spec} patch for what stands in front "
            f"of it, and {others} patches for something else; LLM.condition makes one"
        )

    def patch(self, prompt: Prompt, hit: Hit, hits: Sequence[Hit], found: Found) -> KVPatch | None:
        """The patch made for the hit's antecedents; None if there is none for exactly them."""
        return self.patch_of(hit.variant, prompt, hit.number)

    def patch_of(self, variant: Variant, prompt: Prompt, number: int) -> KVPatch | None:
        """The patch that a variant has for a chunk of a prompt, if it was made of that chunk, with
        that model, for what stands in front of it."""
        bound = antecedents(prompt, number)
        if bound.nothing:
            return None
        patch, tag = variant.facts.get(self.patch_key(bound)), prompt.model.tag
        if patch is None and self.window:
            return self._survivor(variant, bound, tag)
        made = made_for(patch, variant, tag) if isinstance(patch, KVPatch) else None
        return patch if made is not None and made.key == bound.key else None

    def patch_key(self, bound: Antecedents) -> str:
        """Under which a variant's `facts` hold the patch for the antecedents `bound`."""
        return self._recipe + bound.key

    def patch_bytes(self, tokens: int, width: int, layers: int, item_bytes: int) -> int:
        """What a patch takes; `width` numbers are the keys and values of a token in a layer."""
        return max(0, layers - self.shallow) * self.rank * (tokens + width) * item_bytes

    @property
    def _recipe(self) -> str:
        return f"kamera:{self.rank}:{self.shallow}:{self.orbit}:"

    def _survivor(self, variant: Variant, bound: Antecedents, tag: str) -> KVPatch | None:
        """The patch made for the fewest antecedents of which `bound` is what a window left."""
        left: list[tuple[int, KVPatch]] = []
        for name, patch in variant.facts.items():
            if isinstance(patch, KVPatch) and name.startswith(self._recipe):
                before = made_for(patch, variant, tag)
                if before is not None and bound.left_of(before):
                    left.append((len(before.chunks), patch))
        return min(left, key=lambda entry: entry[0], default=(0, None))[1]


def _first(prompt: Prompt, number: int) -> bool:
    return prompt.segments[number].start == 0


def made_for(patch: KVPatch, variant: Variant, tag: str) -> Antecedents | None:
    """The antecedents a patch was made for; None if it was made of another chunk than the
    variant's, or with another model."""
    chunk, model, bound, _ = (*patch.origin.split(" "), "", "", "", "")[:4]
    return Antecedents.parse(bound) if (chunk, model) == (variant.key.chunk, tag) else None


def signed(patch: KVPatch, chunk: str, tag: str, bound: Antecedents) -> KVPatch:
    """The patch with its origin: the chunk, the model, the antecedents in their order, and a digest
    of the patch itself."""
    digest = hashlib.blake2b(digest_size=16)
    for array in (patch.k, patch.v, patch.k_left, patch.v_left):
        digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return dataclasses.replace(patch, origin=f"{chunk} {tag} {bound} {digest.hexdigest()}")


def low_rank_patch(
    alone: KV, behind: KV, rank: int, shallow: int = 0, dtype: type[np.floating] = np.float32
) -> KVPatch:
    """The best patch of `rank` that makes `alone` into `behind`, both at positions from 0.

    It begins at layer `shallow`. Both factors carry the root of a singular value, which keeps them
    within the range of float16; those beyond a layer's own rank are zeros.
    """
    deltas = [b - a for a, b in zip(alone, behind, strict=True) if a is not None and b is not None]
    layers, tokens, heads, _ = deltas[0].shape
    shallow, widths = min(shallow, layers), [delta.shape[3] for delta in deltas]
    joined = np.concatenate([delta.reshape(layers, tokens, -1) for delta in deltas], axis=2)
    left = np.zeros((layers - shallow, tokens, rank), dtype)
    right = np.zeros((layers - shallow, rank, joined.shape[2]), dtype)
    for number, delta in enumerate(joined[shallow:]):
        kept = min(rank, *delta.shape)
        left[number, :, :kept], right[number, :kept] = _best_factors(delta, kept)
    at = heads * widths[0]
    k = right[:, :, :at].reshape(-1, rank, heads, widths[0])
    if len(widths) == 1:
        return KVPatch(k, None, left, l0=shallow)
    v = right[:, :, at:].reshape(-1, rank, heads, widths[1])
    return KVPatch(k, v, left, left, l0=shallow)


def _best_factors(delta: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The two factors of the matrix of `rank` nearest to `delta`, each with the root of a singular
    value. From the eigenvectors of the smaller Gram matrix, which take a third of an SVD's time."""
    exact = delta.astype(np.float64)
    wide = exact if delta.shape[0] <= delta.shape[1] else exact.T
    _, vectors = np.linalg.eigh(wide @ wide.T)  # ascending
    basis = vectors[:, ::-1][:, :rank]
    within = basis.T @ wide
    root = np.sqrt(np.linalg.norm(within, axis=1))
    other = np.divide(within, root[:, None], out=np.zeros_like(within), where=root[:, None] > 0)
    factors = basis * root, other
    return factors if wide is exact else (factors[1].T, factors[0].T)


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
