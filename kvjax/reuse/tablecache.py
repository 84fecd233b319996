"""TableCache (arXiv 2601.08743): tables are encoded behind those that their foreign keys refer to.

A foreign column says little without the table it refers to. Offline, each table is computed behind
its referenced tables, in topological order, and its own KV is kept. Online, a prompt names a set
of tables; of each table the variant serves whose context is the largest set that the prompt has as
well, whatever the order, found in a trie over sets. Nothing is run again. A batch of prompts is
queued so that those over similar sets are neighbours, which a bounded store needs.

Only the abstract and a topic page were available. Inferred: that
a table is encoded behind the tables it refers to directly, each as plain text; that the trie holds
contexts and that a table with one that the prompt lacks is not used; the order of prompts, which is
that of the trie over sets with frequent tables first. A schema that changes gives other chunks, so
that what was encoded behind the old table is not found. Not here: a linker that chooses tables
(the prompt does), and loading beside computing, which needs a tier below the device.
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Collection, Sequence
from typing import ClassVar, Literal

from kvjax.cache.chunks import Variant, tokens_hash
from kvjax.reuse.foreign_keys import foreign_keys, referenced_first
from kvjax.reuse.settrie import SetTrie
from kvjax.reuse.strategy import CanonicalChunks, Document, Found, Prompt, Tokens, count_of

PARENTS = ("foreign", "random", "none")


@dataclasses.dataclass(frozen=True)
class TableCache(CanonicalChunks):
    """Chunks are tables; `LLM.chunks.put` encodes a schema, a prompt that misses a table encodes it
    alone.

    Args:
      parents: what a table is encoded behind. "foreign": the tables it refers to, as the caller of
        `put` says or else as SQL says. "random": as many others, a control. "none": nothing.
      max_context: tokens of these tables at most; those that do not fit are left out.
    """

    name: ClassVar[str] = "tablecache"
    parents: Literal["foreign", "random", "none"] = "foreign"
    max_context: int = 4096

    def __post_init__(self) -> None:
        if self.parents not in PARENTS:
            raise ValueError(f"parents must be one of {PARENTS}, got {self.parents!r}")
        count_of("max_context", self.max_context)

    def related(self, corpus: Sequence[Document]) -> list[tuple[int, ...]]:
        """The tables that each table is encoded behind, those that are referred to first."""
        if self.parents == "none":
            return [()] * len(corpus)
        read = foreign_keys([document.text for document in corpus])
        told = [
            guess if document.parents is None else document.parents
            for guess, document in zip(read, corpus, strict=True)
        ]
        if self.parents == "random":
            told = [_others(number, mine, corpus) for number, mine in enumerate(told)]
        rank = {number: place for place, number in enumerate(referenced_first(told))}
        return [
            self._fitting(number, sorted(set(mine) - {number}, key=rank.__getitem__), corpus)
            for number, mine in enumerate(told)
        ]

    def _fitting(
        self, number: int, mine: Sequence[int], corpus: Sequence[Document]
    ) -> tuple[int, ...]:
        kept: list[int] = []
        taken, total = {corpus[number].tokens}, 0
        for parent in mine:
            tokens = corpus[parent].tokens
            if tokens not in taken and total + len(tokens) <= self.max_context:
                kept.append(parent)
                taken.add(tokens)
                total += len(tokens)
        return tuple(kept)

    def wanted(self, prompt: Prompt, number: int, found: Found) -> Tokens | None:
        """The canonical variant, unless one serves."""
        return () if self.look_up(prompt, number, found) is None else None

    def look_up(self, prompt: Prompt, number: int, found: Found) -> Variant | None:
        """The variant behind most of the prompt's tables and nothing else."""
        chunk = prompt.segments[number].chunk
        trie: SetTrie[str, Variant] = SetTrie()
        for variant in found.variants(prompt.salt, chunk).values():
            if variant.page_ids and self._made(variant):
                trie.put(variant.context_chunks, variant)
        best = trie.largest_within(segment.chunk for segment in prompt.segments)
        return None if best is None else best[1]

    def annotate(self, variant: Variant, read: object) -> None:
        """Tells the control's variants from the others."""
        if variant.context_chunks:
            variant.facts[f"tablecache:{self.parents}"] = True

    def _made(self, variant: Variant) -> bool:
        if not variant.context_ids:
            return True  # encoded alone
        return bool(variant.context_chunks) and f"tablecache:{self.parents}" in variant.facts

    def arrange(self, prompts: Sequence[Prompt]) -> list[int]:
        """Prompts over similar tables one behind the other."""
        return similar_together([{s.chunk for s in prompt.segments} for prompt in prompts])


def similar_together(sets: Sequence[Collection[str]]) -> list[int]:
    """An order of sets in which equal ones are neighbours, and then those that share the elements
    which most sets have. Every number once; the same every time."""
    uses = Counter(element for one in sets for element in set(one))
    by_use = sorted(uses, key=lambda element: (-uses[element], element))
    rank = {element: place for place, element in enumerate(by_use)}
    trie: SetTrie[int, list[int]] = SetTrie()
    for number, one in enumerate(sets):
        key = [rank[element] for element in one]
        numbers = trie.get(key)
        if numbers is None:
            trie.put(key, [number])
        else:
            numbers.append(number)
    return [number for _, numbers in trie.items() for number in numbers]


def _others(number: int, mine: Sequence[int], corpus: Sequence[Document]) -> tuple[int, ...]:
    """As many documents as `mine` that are not among them, drawn by the document's own tokens."""
    rest = [other for other in range(len(corpus)) if other != number and other not in mine]
    draw = random.Random(tokens_hash(corpus[number].tokens))
    return tuple(draw.sample(rest, min(len(set(mine)), len(rest))))
