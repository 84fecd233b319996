"""What a corpus is made of: passages that prompts share, and items that ask about them."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

SPLITS = ("tuning", "held_out")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured: `small` runs on a CPU, `full` wants an accelerator."""

    items: int
    num_passages: tuple[int, int]  # of a C1 or C2 prompt, both ends included
    words: tuple[int, int]  # of a C1 or C2 passage; 1.3 tokens each
    message_tokens: int  # at most, of a generated message
    tables: int  # of a C4 prompt
    rag_tokens: int | None  # passages of a W2 prompt in all; None keeps every passage
    text_chars: int | None  # of a W3 article or a W5 window; None keeps the whole


SIZES = {
    "small": Size(
        items=48, num_passages=(5, 5), words=(82, 90), message_tokens=160,
        tables=8, rag_tokens=680, text_chars=1600,
    ),
    "full": Size(
        items=200, num_passages=(6, 10), words=(110, 180), message_tokens=256,
        tables=10, rag_tokens=None, text_chars=None,
    ),
}  # fmt: skip
NUM_WARM_UP = 20  # items for filling stores and fitting patches, before any item that is judged


@dataclasses.dataclass(frozen=True, slots=True)
class Generation:
    """What a model continued a prompt with, greedily."""

    text: str
    token_ids: tuple[int, ...]


Generate = Callable[[Sequence[str], int], Sequence[Generation]]
"""(prompts, most tokens) -> one greedy continuation each, ended by the model's end token."""


@dataclasses.dataclass(frozen=True, slots=True)
class Passage:
    """A text that is stored once and used by many prompts, its line end included.

    Equal ids mean equal texts within a corpus. `parents` are ids of the tables that a table refers
    to. A message that a model generated has its ids (and no line end), and the prompt it continued
    as `source`.
    """

    id: str
    text: str
    parents: tuple[str, ...] = ()
    source: str | None = None
    token_ids: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One prompt: system text, passages in their order, a question, and what answers it.

    `lead` is the begun answer that ends the prompt, so that the next token already is the answer's
    first; it ends with a space where the answer starts with a digit (a token of its own).
    `needs` are places in `passages` without which the question has no answer.
    """

    id: str
    corpus: str
    template: str
    system: str
    passages: tuple[Passage, ...]
    question: str
    answers: tuple[str, ...]  # the gold answer and accepted others; empty: there is none
    lead: str = ""
    needs: tuple[int, ...] = ()
    role: str | None = None  # C3 and W3: the agent that reads

    @property
    def answer(self) -> str:
        """The gold answer; empty if there is none."""
        return self.answers[0] if self.answers else ""

    @property
    def head(self) -> str:
        """ChatML before the passages."""
        return chat_head(self.system)

    @property
    def tail(self) -> str:
        """ChatML after the passages, with the begun answer."""
        return chat_tail(self.question) + self.lead

    def prompt(self, chunk: Callable[[Passage], T]) -> list[str | T]:
        """The whole prompt: text and what `chunk` makes of each passage, in order.

        Each element is tokenised by itself. A line end follows a generated message as text, so that
        the message's tokens are exactly the generated ones.
        """
        found: list[str | T] = [self.head]
        for passage in self.passages:
            found.append(chunk(passage))
            if passage.token_ids is not None:
                found.append("\n")
        return [*found, self.tail]

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """(child, parent) places in `passages` where one table refers to another."""
        places = {passage.id: place for place, passage in enumerate(self.passages)}
        return tuple(
            (child, places[parent])
            for child, passage in enumerate(self.passages)
            for parent in passage.parents
            if parent in places
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Corpus:
    """Items that are judged, and others over the same passages for whatever must come before."""

    name: str
    items: tuple[Item, ...]
    warm_up: tuple[Item, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over everything: equal ones are the same corpus."""
        return digest((*self.items, *self.warm_up))


@dataclasses.dataclass(frozen=True, slots=True)
class Sharing:
    """How often passages come again."""

    uses: int
    distinct: int

    @property
    def hit_rate(self) -> float:
        """Share of uses that a store which forgets nothing has already."""
        return 1 - self.distinct / self.uses if self.uses else 0.0


def sharing(items: Sequence[Item]) -> Sharing:
    """Counts passages of `items` by their text."""
    texts = [passage.text for item in items for passage in item.passages]
    return Sharing(len(texts), len(set(texts)))


def digest(items: Sequence[Item]) -> str:
    """SHA-256 of the items as JSON."""
    text = json.dumps([dataclasses.asdict(item) for item in items], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def solves(item: Item, text: str) -> bool | None:
    """Whether a continuation of the prompt gives the gold answer; None if the item has none.

    After a lead the continuation must start with it, else it may come anywhere, as whole words;
    case, punctuation and spacing do not count.
    """
    if not item.answers:
        return None
    said = _words(text)
    for answer in map(_words, item.answers):
        starts = range(1) if item.lead else range(len(said))
        if any(said[start : start + len(answer)] == answer for start in starts):
            return True
    return False


def chat_head(system: str) -> str:
    """ChatML of a conversation up to the user's text, as SmolLM2's template writes it."""
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"


def chat_tail(question: str) -> str:
    """The rest of the user's text and the start of the assistant's."""
    return f"{question}<|im_end|>\n<|im_start|>assistant\n"


def check_split(split: str) -> None:
    """Raises `ValueError` for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")


def halves(split: str) -> slice:
    """Which entries of a list belong to a split: even places tune, odd ones are held out."""
    check_split(split)
    return slice(SPLITS.index(split), None, 2)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[=<>*]+", text.lower())
