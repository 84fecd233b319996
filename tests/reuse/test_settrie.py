"""The set trie against brute force, foreign keys in SQL, and orders."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.reuse.foreign_keys import declared, foreign_keys, referenced_first
from kvjax.reuse.settrie import SetTrie
from kvjax.reuse.tablecache import similar_together

SETS = st.lists(st.frozensets(st.integers(0, 7), max_size=6), max_size=20)


@given(SETS, st.frozensets(st.integers(0, 9)))
@settings(max_examples=200, deadline=None)
def test_the_largest_key_within_a_set_is_brute_forces(keys, within):
    trie: SetTrie[int, int] = SetTrie()
    held = {}
    for number, key in enumerate(keys):
        trie.put(key, number)
        held[key] = number
    inside = [key for key in held if key <= within]
    found = trie.largest_within(within)
    if not inside:
        assert found is None
        return
    assert found is not None
    most = max(len(key) for key in inside)
    assert found[0] == min(tuple(sorted(key)) for key in inside if len(key) == most)
    assert found[1] == held[frozenset(found[0])]


@given(SETS)
@settings(max_examples=100, deadline=None)
def test_a_trie_is_the_map_that_was_put_into_it_in_canonical_order(keys):
    trie: SetTrie[int, int] = SetTrie()
    for number, key in enumerate(keys):
        trie.put(sorted(key, reverse=True), number)
    held = {tuple(sorted(key)): number for number, key in enumerate(keys)}
    assert list(trie.items()) == sorted(held.items())
    assert len(trie) == len(held)
    for key in keys:
        assert trie.get(key) == held[tuple(sorted(key))]
    assert trie.get([11]) is None


@given(st.lists(st.frozensets(st.sampled_from("abcdef"), max_size=4), max_size=24))
@settings(max_examples=200, deadline=None)
def test_reordering_loses_no_query_and_brings_equal_sets_together(sets):
    order = similar_together(sets)
    assert sorted(order) == list(range(len(sets)))
    runs = [sets[n] for at, n in enumerate(order) if not at or sets[n] != sets[order[at - 1]]]
    assert len(runs) == len(set(runs))
    assert order == similar_together([sorted(one, reverse=True) for one in sets])


def lru_hits(sets, order, capacity):
    """Tables found in a cache of `capacity` tables that forgets the least recently used."""
    held: dict[str, None] = {}
    hits = 0
    for number in order:
        for table in sorted(sets[number]):
            hits += table in held
            held.pop(table, None)
            held[table] = None
            while len(held) > capacity:
                del held[next(iter(held))]
    return hits


def test_reordering_brings_a_small_cache_more_hits():
    sets = [{"orders", "customer"}, {"part", "supplier"}, {"nation", "region"}] * 4
    given_order = lru_hits(sets, range(len(sets)), 3)
    assert given_order == 0
    assert lru_hits(sets, similar_together(sets), 3) == 18  # all but the first of each


@pytest.mark.parametrize(
    ("text", "tables", "references"),
    [
        ("CREATE TABLE a (x INT REFERENCES b(y), z INT);", ("a",), ("b",)),
        ('create table if not exists "My Table" (x int references `B`)', ("my table",), ("b",)),
        ("CREATE TEMP TABLE s.a (FOREIGN KEY (x) REFERENCES [s].[b] (y))", ("a",), ("b",)),
        ("CREATE TABLE a (boss INT REFERENCES a(id))", ("a",), ()),
        ("CREATE TABLE a (x INT); -- REFERENCES b\n/* REFERENCES c */", ("a",), ()),
        ("CREATE TABLE a (x TEXT DEFAULT 'it''s REFERENCES b')", ("a",), ()),
        ("CREATE TABLE a (x INT REFERENCES b, y INT REFERENCES b)", ("a",), ("b",)),
        ("some text about a table", (), ()),
    ],
)
def test_foreign_keys_are_read_from_sql(text, tables, references):
    assert declared(text) == (tables, references)


def test_a_reference_is_to_the_text_that_creates_the_table_nearest_of_several():
    texts = [
        "CREATE TABLE nation (id INT)",
        "CREATE TABLE customer (n INT REFERENCES nation, o INT REFERENCES nowhere)",
        "CREATE TABLE part (id INT)",
        "CREATE TABLE nation (id INT)",
        "CREATE TABLE supplier (n INT REFERENCES Nation(id))",
    ]
    assert foreign_keys(texts) == [(), (0,), (), (), (3,)]


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_what_is_referred_to_comes_first_where_there_is_no_cycle(data):
    count = data.draw(st.integers(1, 8))
    names = data.draw(st.permutations(range(count)))
    parents = [[] for _ in range(count)]
    for at in range(1, count):
        parents[names[at]] = data.draw(st.lists(st.sampled_from(names[:at]), max_size=3))
    order = referenced_first(parents)
    assert sorted(order) == list(range(count))
    place = {number: at for at, number in enumerate(order)}
    assert all(place[p] < place[n] for n, mine in enumerate(parents) for p in mine)


def test_a_cycle_is_cut_the_same_way_every_time():
    assert referenced_first([[1], [2], [0]]) == [2, 1, 0]
    assert referenced_first([[0, 1], [0]]) == [1, 0]


def test_a_parent_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="document 0 refers to document 3; there are 2"):
        referenced_first([[3], []])
