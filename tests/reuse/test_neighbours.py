"""Neighbours by TF-IDF."""

import numpy as np
import pytest

from kvjax.reuse.neighbours import neighbours, tfidf

CORPUS = ((1, 2, 2), (2, 3), (4, 5, 5, 5), (5, 4), (9,))


def by_hand(tokens, corpus):
    """The definition, one term at a time."""
    terms = sorted({t for chunk in corpus for t in chunk})
    idf = {t: np.log((1 + len(corpus)) / (1 + sum(t in c for c in corpus))) + 1 for t in terms}

    def vector(chunk):
        v = np.array([chunk.count(t) * idf[t] for t in terms])
        return v / np.linalg.norm(v)

    return np.array([vector(chunk) @ vector(tokens) for chunk in corpus])


@pytest.mark.parametrize("tokens", CORPUS)
def test_similarity_is_the_cosine_of_tfidf_vectors(tokens):
    np.testing.assert_allclose(tfidf(tokens, CORPUS), by_hand(tokens, CORPUS), rtol=1e-12)


def test_a_golden_cosine():
    # df is 1 for both tokens of two chunks, so idf is the same and cancels.
    np.testing.assert_allclose(tfidf((7, 8), ((7, 7, 8), (9,))), [3 / np.sqrt(10), 0])


def test_unknown_tokens_are_like_nothing():
    np.testing.assert_array_equal(tfidf((77,), CORPUS), np.zeros(len(CORPUS)))


def test_neighbours_are_ordered_and_leave_out_the_chunk_itself_and_strangers():
    assert neighbours(CORPUS[0], CORPUS, 10, tfidf) == (1,)
    assert neighbours(CORPUS[2], CORPUS, 10, tfidf) == (3,)
    assert neighbours(CORPUS[4], CORPUS, 10, tfidf) == ()
    assert neighbours(CORPUS[0], CORPUS, 0, tfidf) == ()
    assert neighbours((1, 2), (), 3, tfidf) == ()


def test_of_equal_chunks_the_first_is_the_neighbour():
    corpus = ((1, 2), (1, 3), (1, 3), (1, 4, 5, 6))
    assert neighbours((1, 2), corpus, 5, tfidf) == (1, 3)
    assert neighbours((1, 2), corpus, 1, tfidf) == (1,)
