"""The comparisons have power: backends with one mistake each, registered by name, fail them."""

import jax
import numpy as np
import pytest

from kvjax.pallas_kernels import OPERATIONS
from kvjax.pallas_kernels.paged_attention import xla
from tests.pallas_kernels.attention_cases import Heads, assert_matches_reference, problem

SCATTERED = [(60, [(0, 11), (0, 30), (0, 31)]), (33, [(0, 33)]), (40, [(12, 30), (14, 32)])]

run = jax.jit(
    xla.paged_attention,
    static_argnames=("scale", "soft_cap", "value_width", "max_query_len", "return_lse"),
)


def sees_one_more(q, pages, tables, starts, kv_lens, lo, hi, **options):
    return run(q, pages, tables, starts, kv_lens, lo, hi + 1, **options)


def sees_one_less(q, pages, tables, starts, kv_lens, lo, hi, **options):
    return run(q, pages, tables, starts, kv_lens, lo, hi - 1, **options)


def aligns_to_the_bottom_right(q, pages, tables, starts, kv_lens, lo, hi, **options):
    owner = np.repeat(np.arange(3), [3, 1, 2])
    past = np.array([3, 2, 1, 1, 2, 1], np.int32)  # queries from here to the end of the sequence
    hi = kv_lens[owner] - past + 1
    return run(q, pages, tables, starts, kv_lens, lo, hi, **options)


def forgets_the_window(q, pages, tables, starts, kv_lens, lo, hi, **options):
    return run(q, pages, tables, starts, kv_lens, lo * 0, hi, **options)


def forgets_the_tail(*args, tail_mask, **options):
    return run(*args, tail_mask=tail_mask | ~tail_mask, **options)


def forgets_the_sinks(*args, sinks, **options):
    return run(*args, sinks=sinks * 0 - 1e9, **options)


def reads_the_neighbouring_page(q, pages, tables, *args, **options):
    return run(q, pages, (tables + 1) % pages.num_pages, *args, **options)


def forgets_the_scales(q, pages, *args, **options):
    return run(
        q, jax.tree.map(np.ones_like, pages)._replace(k=pages.k, v=pages.v), *args, **options
    )


def scales_values_as_keys(q, pages, *args, **options):
    return run(q, pages._replace(v_scale=pages.k_scale), *args, **options)


def takes_the_next_slots_scale(q, pages, *args, **options):
    shifted = np.roll(pages.k_scale, 1, axis=2)
    return run(q, pages._replace(k_scale=shifted), *args, **options)


def run_as_is(*args, **options):
    return run(*args, **options)


BUGS = [
    sees_one_more,
    sees_one_less,
    aligns_to_the_bottom_right,
    forgets_the_window,
    forgets_the_tail,
    forgets_the_sinks,
    reads_the_neighbouring_page,
]


@pytest.fixture
def registered(request):
    operation = OPERATIONS["paged_attention"]
    operation.register(request.param.__name__, request.param)
    yield request.param.__name__
    del operation.implementations[request.param.__name__]


@pytest.mark.parametrize("registered", BUGS, ids=lambda bug: bug.__name__, indirect=True)
def test_a_planted_bug_is_caught(registered):
    p = problem(1, Heads(4, 2, 32), SCATTERED, tail_words=1, sinks=True)
    with pytest.raises(AssertionError):
        assert_matches_reference(p, backend=registered)


QUANTISED = [forgets_the_scales, scales_values_as_keys, takes_the_next_slots_scale]


@pytest.mark.parametrize("physical", [np.int8, np.uint8], ids=["int8", "float8"])
@pytest.mark.parametrize("registered", QUANTISED, ids=lambda bug: bug.__name__, indirect=True)
def test_a_planted_bug_in_quantised_pages_is_caught(registered, physical):
    p = problem(1, Heads(4, 2, 32), SCATTERED, physical=physical)
    assert_matches_reference(p, backend="xla")
    with pytest.raises(AssertionError):
        assert_matches_reference(p, backend=registered)


@pytest.mark.parametrize("registered", [run_as_is], ids=["as is"], indirect=True)
def test_the_unmutated_backend_passes_the_same_comparison(registered):
    p = problem(1, Heads(4, 2, 32), SCATTERED, tail_words=1, sinks=True)
    assert_matches_reference(p, backend=registered)
