"""The rule that says when a cascade pays: its formula and its groups."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.pallas_kernels import plan_cascade
from kvjax.pallas_kernels.cascade_attention import cascade_bytes

PAGE = 16
TOKEN, STATE = 4096, 16512  # 8 KV heads and 32 query heads of 128, bfloat16


def tables(groups: list[tuple[int, int]], own: int = 2) -> tuple[list[list[int]], list[int]]:
    """`members` sequences with `pages` shared pages and `own` of their own, for each group."""
    fresh = iter(range(10**6))
    found = []
    for members, pages in groups:
        prefix = [next(fresh) for _ in range(pages)]
        found += [prefix + [next(fresh) for _ in range(own)] for _ in range(members)]
    return found, [PAGE * len(table) for table in found]


def plan(block_tables, kv_lens, **sizes):
    return plan_cascade(
        block_tables, kv_lens, PAGE, **{"token_bytes": TOKEN, "state_bytes": STATE} | sizes
    )


def test_the_saving_of_a_long_shared_prefix_is_the_formula():
    """32 requests over 16k tokens, 32 more each: (n P + S) / (P + S), less the partial states."""
    block_tables, kv_lens = tables([(32, 1024)])
    got = plan(block_tables, kv_lens)
    assert (got.group_starts, got.prefix_lens) == ([0, 32], [16384])
    assert got.plain_bytes == (32 * 16384 + 32 * 32) * TOKEN + 32 * STATE
    assert got.cascade_bytes == (16384 + 32 * 32) * TOKEN + 5 * 32 * STATE
    assert got.pays


def test_neighbouring_groups_are_found_and_loners_stay_alone():
    block_tables, kv_lens = tables([(3, 100), (1, 7), (2, 40)])
    got = plan(block_tables, kv_lens)
    assert (got.group_starts, got.prefix_lens) == ([0, 3, 4, 6], [1600, 0, 640])


def test_a_short_prefix_does_not_pay_for_its_partial_states():
    assert not plan(*tables([(2, 1)])).pays
    assert plan(*tables([(2, 100)])).pays
    assert not plan(*tables([(4, 0)])).pays


def test_a_distant_relative_does_not_shorten_the_prefix_of_a_group():
    block_tables, kv_lens = tables([(6, 100)])
    cousin = block_tables[0][:2] + [-5] * 100
    got = plan([*block_tables, cousin], [*kv_lens, PAGE * 102])
    assert (got.group_starts, got.prefix_lens) == ([0, 6, 7], [1600, 0])


def test_only_whole_pages_up_to_the_shortest_member_are_shared():
    """What a table holds past its sequence is ignored, equal or not."""
    got = plan([[1, 2, 3, 0, 0], [1, 2, 9, 0, 0]], [40, 35])
    assert (got.group_starts, got.prefix_lens) == ([0, 2], [32])
    got = plan([[1, 2, 3, 0, 0], [1, 2, 3, 0, 0]], [40, 31])
    assert got.prefix_lens == [16]


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=6), st.integers(0, 96)), max_size=8))
def test_groups_cover_the_batch_and_share_what_they_say(batch):
    block_tables, kv_lens = [b for b, _ in batch], [min(n, PAGE * len(b)) for b, n in batch]
    got = plan(block_tables, kv_lens)
    if not batch:
        assert not got.pays
        return
    assert got.group_starts[0] == 0
    assert got.group_starts[-1] == len(batch)
    assert len(got.prefix_lens) == len(got.group_starts) - 1
    for first, last, prefix in zip(
        got.group_starts, got.group_starts[1:], got.prefix_lens, strict=False
    ):
        assert first < last
        assert prefix <= min(kv_lens[first:last])
        assert len({tuple(b[: prefix // PAGE]) for b in block_tables[first:last]}) == 1
    no_states = cascade_bytes(
        got.group_starts, got.prefix_lens, kv_lens, token_bytes=TOKEN, state_bytes=0
    )
    assert no_states[1] <= no_states[0]


@pytest.mark.parametrize("num_queries", [1, 8])
def test_more_query_tokens_keep_more_partial_states(num_queries):
    block_tables, kv_lens = tables([(2, 8)])
    got = plan(block_tables, kv_lens, num_queries=num_queries)
    assert got.cascade_bytes - got.plain_bytes == 4 * 2 * STATE * num_queries - 128 * TOKEN
