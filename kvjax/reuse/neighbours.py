"""Which chunks of a corpus are most like a chunk, from token ids alone. Pure numpy."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kvjax.reuse.strategy import Tokens

# `similarity(tokens, corpus)` is f64[len(corpus)]; what is not above 0 is no neighbour.
Similarity = Callable[[Tokens, Sequence[Tokens]], np.ndarray]


class _Index(NamedTuple):
    """A corpus as sparse rows of unit length."""

    terms: np.ndarray  # distinct token ids, ascending
    idf: np.ndarray  # of each term
    row: np.ndarray  # chunk of each entry
    column: np.ndarray  # term of each entry
    weight: np.ndarray
    num_chunks: int


@functools.lru_cache(maxsize=1)
def _index(corpus: tuple[Tokens, ...]) -> _Index:
    sizes = [len(tokens) for tokens in corpus]
    ids = np.concatenate([np.asarray(tokens, np.int64) for tokens in corpus])
    terms, column = np.unique(ids, return_inverse=True)
    entry, counts = np.unique(
        np.repeat(np.arange(len(corpus)), sizes) * len(terms) + column, return_counts=True
    )
    row, column = np.divmod(entry, len(terms))
    idf = np.log((1 + len(corpus)) / (1 + np.bincount(column, minlength=len(terms)))) + 1
    weight = counts * idf[column]
    norm = np.sqrt(np.bincount(row, weight**2, minlength=len(corpus)))
    return _Index(terms, idf, row, column, weight / norm[row], len(corpus))


def tfidf(tokens: Tokens, corpus: Sequence[Tokens]) -> np.ndarray:
    """Cosine of TF-IDF vectors over token ids: raw counts times `log((1 + N) / (1 + df)) + 1`.

    Tokens that the corpus does not have count for nothing.
    """
    index = _index(tuple(map(tuple, corpus)))
    ids, counts = np.unique(np.asarray(tokens, np.int64), return_counts=True)
    known = np.isin(ids, index.terms)
    at = np.searchsorted(index.terms, ids[known])
    query = np.zeros(len(index.terms))
    query[at] = counts[known] * index.idf[at]
    length = np.linalg.norm(query)
    dots = np.bincount(index.row, index.weight * query[index.column], minlength=index.num_chunks)
    return dots / length if length else dots


# By the name that a strategy's option gives; one from outside is one more entry.
SIMILARITIES: dict[str, Similarity] = {"tfidf": tfidf}


def neighbours(
    tokens: Tokens, corpus: Sequence[Tokens], most: int, similarity: Similarity
) -> tuple[int, ...]:
    """Numbers of the `most` chunks most like `tokens`, best first; never one equal to it or to
    another neighbour, and none with a similarity of 0. Ties go to the earlier one."""
    if not most or not corpus:
        return ()
    scores = similarity(tokens, corpus)
    taken, found = {tuple(tokens)}, []
    for number in np.argsort(-scores, kind="stable").tolist():
        if len(found) == most or scores[number] <= 0:
            break
        if corpus[number] and tuple(corpus[number]) not in taken:
            taken.add(tuple(corpus[number]))
            found.append(number)
    return tuple(found)
