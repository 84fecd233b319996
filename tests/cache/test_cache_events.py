"""Cache events: an index kept from them is, at any time, what the tree holds."""

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from kvjax.cache.events import BlockEvents, Event, block_hashes
from kvjax.cache.pool import PagePool
from kvjax.cache.radix import RadixTree

PAGE = 4
TEXTS = st.text("ab", min_size=1, max_size=14)


class Index:
    """What a router keeps."""

    def __init__(self) -> None:
        self.blocks: set[str] = set()

    def take(self, event: Event) -> None:
        if event["type"] == "cleared":
            self.blocks.clear()
        elif event["type"] == "stored":
            assert event["block_size"] == PAGE
            assert event["parent_block_hash"] is None or event["parent_block_hash"] in self.blocks
            assert not self.blocks & set(event["block_hashes"]), "stored twice"
            self.blocks |= set(event["block_hashes"])
        else:
            assert set(event["block_hashes"]) <= self.blocks, "removed, but never stored"
            self.blocks -= set(event["block_hashes"])


def cached_blocks(tree: RadixTree, texts: list[tuple[str, str]]) -> set[str]:
    """Of everything that was ever stored, the blocks that a match still finds."""
    found: set[str] = set()
    for namespace, text in texts:
        tokens = np.array([ord(letter) for letter in text])
        known = tree.match(namespace, tokens).num_tokens
        found |= set(block_hashes(namespace, tokens[:known], PAGE))
    return found


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["x", "y"]), TEXTS),
            st.integers(1, 4),
            st.sampled_from(["reset", "clear"]),
        ),
        max_size=25,
    )
)
def test_an_index_kept_from_events_is_what_the_tree_holds(actions):
    pool = PagePool(64, PAGE)
    tree, index = RadixTree(pool), Index()
    tree.observers.append(BlockEvents(PAGE, index.take))
    stored: list[tuple[str, str]] = []
    for action in actions:
        if isinstance(action, int):
            tree.evict(action)
        elif action == "reset":
            tree.reset()
        elif action == "clear":
            tree.clear()
        else:
            namespace, text = action
            tokens = [ord(letter) for letter in text]
            match = tree.match(namespace, tokens)
            whole = match.num_tokens // PAGE  # a writer copies the partial page
            table = [*match.page_ids[:whole]]
            pool.retain(table)
            table += pool.allocate(-(-len(text) // PAGE) - whole)
            tree.insert(namespace, tokens, table)
            pool.release(table)
            stored.append(action)
        assert index.blocks == cached_blocks(tree, stored)
    late = Index()
    for event in BlockEvents(PAGE, late.take).snapshot(tree):
        late.take(event)
    assert late.blocks == index.blocks


def test_hashes_depend_on_all_tokens_before_and_on_the_namespace():
    tokens = np.arange(12)
    hashes = block_hashes(("salt", "exact"), tokens, PAGE)
    assert len(set(hashes)) == 3
    assert block_hashes(("salt", "exact"), tokens[:8], PAGE) == hashes[:2]
    assert block_hashes(("other", "exact"), tokens, PAGE)[0] != hashes[0]
    changed = tokens.copy()
    changed[0] = 99
    assert not set(block_hashes(("salt", "exact"), changed, PAGE)) & set(hashes)
