"""C2, binding: one passage says what a word stands for, a later one uses the word.

Asking by what it stands for needs both, and the later passage's own KV needs the earlier one: it is
what reuse loses. Every passage that uses words meets three that define them, each another way, so
that its KV, stored once, is right for one at most. A topic has three definitions and two uses; the
definition always comes first.
"""

import dataclasses
import itertools
import random
from collections.abc import Sequence

from kvjax.benchmarks.corpora import prose, words
from kvjax.benchmarks.corpora.binding_templates import TEMPLATES, Template
from kvjax.benchmarks.corpora.item import NUM_WARM_UP, SIZES, Corpus, Item, Passage, halves

SYSTEM = "Answer from the notes below. Earlier notes explain words of later ones."
NUM_TOPICS, NUM_WORDS, NUM_USES = 16, 3, 2


@dataclasses.dataclass(frozen=True, slots=True)
class _Use:
    passage: Passage
    numbers: tuple[str, ...]  # by alias


@dataclasses.dataclass(frozen=True, slots=True)
class _Topic:
    template: Template
    meanings: tuple[str, ...]
    definitions: tuple[Passage, ...]  # number d gives alias a the meaning (a + d) % NUM_WORDS
    uses: tuple[_Use, ...]


def build(split: str, size: str, seed: int) -> Corpus:
    """The corpus of a split: the judged items, then those that may come before."""
    shape = SIZES[size]
    rng = random.Random(f"binding {split} {size} {seed}")
    topics = _topics(rng, split, shape.words)
    cases = list(itertools.product(topics, range(NUM_WORDS), range(NUM_USES), range(NUM_WORDS)))
    rng.shuffle(cases)
    items: list[Item] = []
    for topic, definition, use, alias in cases[: shape.items + NUM_WARM_UP]:
        others = [
            p
            for other in topics
            if other is not topic
            for p in (rng.choice(other.definitions), rng.choice(other.uses).passage)
        ]
        rest = rng.sample(others, rng.randint(*shape.num_passages) - 2)
        needed = [topic.definitions[definition], topic.uses[use].passage]
        items.append(_item(rng, split, len(items), topic, definition, use, alias, needed, rest))
    return Corpus("binding", tuple(items[: shape.items]), tuple(items[shape.items :]))


def _item(
    rng: random.Random,
    split: str,
    number: int,
    topic: _Topic,
    definition: int,
    use: int,
    alias: int,
    needed: Sequence[Passage],
    rest: Sequence[Passage],
) -> Item:
    first, second = sorted(rng.sample(range(len(rest) + 2), 2))
    passages = list(rest)
    passages.insert(first, needed[0])
    passages.insert(second, needed[1])
    template = topic.template
    meaning = topic.meanings[(alias + definition) % NUM_WORDS]
    return Item(
        id=f"binding-{split}-{number}",
        corpus="binding",
        template=template.name,
        system=SYSTEM,
        passages=tuple(passages),
        question=template.question.format(meaning=meaning),
        lead=_filled(template.lead, meaning=meaning),
        answers=(topic.uses[use].numbers[alias],),
        needs=(first, second),
    )


def _topics(rng: random.Random, split: str, num_words: tuple[int, int]) -> list[_Topic]:
    templates = TEMPLATES[halves(split)]
    people, numbers = _people(rng, split), words.Numbers(rng)
    topics: list[_Topic] = []
    for at in range(NUM_TOPICS):
        template, turn = templates[at % len(templates)], at // len(templates)
        aliases = template.aliases[turn * NUM_WORDS :][:NUM_WORDS]
        meanings = template.meanings[turn * NUM_WORDS :][:NUM_WORDS] or people[at]
        definitions = tuple(
            Passage(
                f"binding-{split}-{at}.define{shift}",
                _text(rng, split, num_words, template.define, [
                    {"alias": alias, "meaning": meanings[(a + shift) % NUM_WORDS]}
                    for a, alias in enumerate(aliases)
                ]),
            )
            for shift in range(NUM_WORDS)
        )  # fmt: skip
        uses: list[_Use] = []
        for use in range(NUM_USES):
            values = tuple(numbers.take(NUM_WORDS))
            facts = [{"alias": a, "number": n} for a, n in zip(aliases, values, strict=True)]
            text = _text(rng, split, num_words, template.use, facts)
            uses.append(_Use(Passage(f"binding-{split}-{at}.use{use}", text), values))
        topics.append(_Topic(template, meanings, definitions, tuple(uses)))
    return topics


def _people(rng: random.Random, split: str) -> list[tuple[str, ...]]:
    """Names per topic. Two topics share a draw: there are more topics than last names."""
    drawn = words.people(rng, split, -(-NUM_TOPICS // 2), 2 * NUM_WORDS)
    return [tuple(group[half::2]) for group in drawn for half in range(2)]


def _text(
    rng: random.Random,
    split: str,
    num_words: tuple[int, int],
    pattern: str,
    facts: list[dict[str, str]],
) -> str:
    sentences = [_filled(pattern, **fact) for fact in facts]
    rng.shuffle(sentences)
    return prose.passage(rng, split, sentences, rng.randint(*num_words))


def _filled(pattern: str, **words: str) -> str:
    text = pattern.format(**words)
    return text[0].upper() + text[1:]
