"""C1, lookup: one fact among many answers the question.

Ten topics of six passages; a passage states three facts of its topic's template. A prompt takes
three passages of one topic and others of other topics, in any order.
"""

import dataclasses
import random

from kvjax.benchmarks.corpora import prose, words
from kvjax.benchmarks.corpora.item import NUM_WARM_UP, SIZES, Corpus, Item, Passage, halves

SYSTEM = "Answer from the notes below."
NUM_TOPICS, PER_TOPIC, NUM_FACTS = 10, 6, 3


@dataclasses.dataclass(frozen=True, slots=True)
class Template:
    """A fact, the question for it, and the begun answer."""

    name: str
    fact: str
    question: str
    lead: str
    values: tuple[str, ...] = ()  # empty: numbers


TEMPLATES = (  # even ones tune, odd ones are held out
    Template(
        "locker", "The locker code of {name} is {value}.",
        "What is the locker code of {name}?", "The locker code of {name} is ",
    ),
    Template(
        "badge", "{name} carries badge number {value}.",
        "Which badge number does {name} carry?", "{name} carries badge number ",
    ),
    Template(
        "room", "The desk of {name} stands in room {value}.",
        "In which room does the desk of {name} stand?", "The desk of {name} stands in room ",
    ),
    Template(
        "extension", "Calls for {name} go to extension {value}.",
        "To which extension do calls for {name} go?", "Calls for {name} go to extension ",
    ),
    Template(
        "town", "{name} grew up in {value}.",
        "Where did {name} grow up?", "{name} grew up in", words.TOWNS,
    ),
    Template(
        "instrument", "{name} plays the {value}.",
        "What does {name} play?", "{name} plays the", words.INSTRUMENTS,
    ),
    Template(
        "shelf", "Parcels for {name} are kept on shelf {value}.",
        "On which shelf are parcels for {name} kept?", "Parcels for {name} are kept on shelf ",
    ),
    Template(
        "berth", "The boat of {name} lies at berth {value}.",
        "At which berth does the boat of {name} lie?", "The boat of {name} lies at berth ",
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    passage: Passage
    facts: tuple[tuple[str, str], ...]  # (name, value)


def build(split: str, size: str, seed: int) -> Corpus:
    """The corpus of a split: the judged items, then those that may come before."""
    shape = SIZES[size]
    rng = random.Random(f"lookup {split} {size} {seed}")
    topics = _topics(rng, split, shape.words)
    items: list[Item] = []
    asked: set[tuple[str, frozenset[str]]] = set()
    while len(items) < shape.items + NUM_WARM_UP:
        number = len(items)
        template, topic = topics[number % NUM_TOPICS]
        others = [e for _, entries in topics if entries is not topic for e in entries]
        mine = rng.sample(topic, 3)
        name, value = rng.choice(mine[0].facts)
        chosen = mine + rng.sample(others, rng.randint(*shape.num_passages) - len(mine))
        key = (name, frozenset(entry.passage.id for entry in chosen))
        if key in asked:
            continue
        asked.add(key)
        rng.shuffle(chosen)
        item = Item(
            id=f"lookup-{split}-{number}",
            corpus="lookup",
            template=template.name,
            system=SYSTEM,
            passages=tuple(entry.passage for entry in chosen),
            question=template.question.format(name=name),
            lead=template.lead.format(name=name),
            answers=(value,),
            needs=(chosen.index(mine[0]),),
        )
        items.append(item)
    return Corpus("lookup", tuple(items[: shape.items]), tuple(items[shape.items :]))


def _topics(
    rng: random.Random, split: str, num_words: tuple[int, int]
) -> list[tuple[Template, list[_Entry]]]:
    templates = TEMPLATES[halves(split)]
    people = words.people(rng, split, NUM_TOPICS, PER_TOPIC * NUM_FACTS)
    numbers = words.Numbers(rng)
    topics: list[tuple[Template, list[_Entry]]] = []
    for topic in range(NUM_TOPICS):
        template = templates[topic % len(templates)]
        names, entries = iter(people[topic]), list[_Entry]()
        for at in range(PER_TOPIC):
            values = (
                rng.sample(template.values[halves(split)], NUM_FACTS)
                if template.values
                else numbers.take(NUM_FACTS)
            )
            facts = tuple((next(names), value) for value in values)
            sentences = [template.fact.format(name=name, value=value) for name, value in facts]
            text = prose.passage(rng, split, sentences, rng.randint(*num_words))
            entries.append(_Entry(Passage(f"lookup-{split}-{topic}.{at}", text), facts))
        topics.append((template, entries))
    return topics
