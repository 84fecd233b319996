"""C2, binding: a passage says whom the next one is about; that one alone does not.

Two such pairs stand in a prompt, and the question names one person: which number is hers shows only
in what the second passage of a pair took over from the first. It is what reuse loses, since a
passage is stored without its neighbours. The same second passage follows other first ones in other
prompts, so that its KV, stored once, is right for one of them at most.
"""

import dataclasses
import random

from kvjax.benchmarks.corpora import prose, words
from kvjax.benchmarks.corpora.binding_templates import TEMPLATES, Template
from kvjax.benchmarks.corpora.item import NUM_WARM_UP, SIZES, Corpus, Item, Passage, halves

SYSTEM = "Answer from the notes below."
NUM_TOPICS, PER_TOPIC = 10, 4  # each topic has as many people as facts


@dataclasses.dataclass(frozen=True, slots=True)
class _Topic:
    template: Template
    people: tuple[str, ...]
    definitions: tuple[Passage, ...]  # by person
    numbers: tuple[str, ...]
    uses: tuple[Passage, ...]  # by number


def build(split: str, size: str, seed: int) -> Corpus:
    """The corpus of a split: the judged items, then those that may come before."""
    shape = SIZES[size]
    rng = random.Random(f"binding {split} {size} {seed}")
    topics = _topics(rng, split, shape.words)
    items: list[Item] = []
    asked: set[tuple[str, ...]] = set()
    while len(items) < shape.items + NUM_WARM_UP:
        topic = topics[len(items) % NUM_TOPICS]
        item = _item(rng, f"binding-{split}-{len(items)}", topic, topics, shape.num_passages)
        key = (item.question, *(passage.id for passage in item.passages))
        if key not in asked:
            asked.add(key)
            items.append(item)
    return Corpus("binding", tuple(items[: shape.items]), tuple(items[shape.items :]))


def _item(
    rng: random.Random,
    name: str,
    topic: _Topic,
    topics: list[_Topic],
    num_passages: tuple[int, int],
) -> Item:
    """Two pairs of the topic among passages of topics with other templates."""
    people, numbers = (rng.sample(range(PER_TOPIC), 2) for _ in range(2))
    pairs = [
        [topic.definitions[person], topic.uses[number]]
        for person, number in zip(people, numbers, strict=True)
    ]
    others = [p for t in topics if t.template != topic.template for p in (*t.definitions, *t.uses)]
    rest = [[passage] for passage in rng.sample(others, rng.randint(*num_passages) - 4)]
    blocks = [*pairs, *rest]
    rng.shuffle(blocks)
    passages = [passage for block in blocks for passage in block]
    first = passages.index(pairs[0][0])
    template, person = topic.template, topic.people[people[0]]
    return Item(
        id=name,
        corpus="binding",
        template=template.name,
        system=SYSTEM,
        passages=tuple(passages),
        question=template.question.format(person=person),
        lead=template.lead.format(person=person),
        answers=(topic.numbers[numbers[0]],),
        needs=(first, first + 1),
    )


def _topics(rng: random.Random, split: str, num_words: tuple[int, int]) -> list[_Topic]:
    templates = TEMPLATES[halves(split)]
    people, numbers = words.people(rng, split, NUM_TOPICS, PER_TOPIC), words.Numbers(rng)
    topics: list[_Topic] = []
    for at in range(NUM_TOPICS):
        template, taken = templates[at % len(templates)], numbers.take(PER_TOPIC)
        definitions = [
            f"{_filler(rng, split, num_words)} {template.define.format(person=person)}"
            for person in people[at]
        ]
        uses = [
            f"{template.use.format(number=number)} {_filler(rng, split, num_words)}"
            for number in taken
        ]
        topic = _Topic(
            template,
            tuple(people[at]),
            _passages(f"binding-{split}-{at}.define", definitions),
            tuple(taken),
            _passages(f"binding-{split}-{at}.use", uses),
        )
        topics.append(topic)
    return topics


def _passages(name: str, texts: list[str]) -> tuple[Passage, ...]:
    return tuple(Passage(f"{name}{at}", f"{text}\n") for at, text in enumerate(texts))


def _filler(rng: random.Random, split: str, num_words: tuple[int, int]) -> str:
    return prose.filler(rng, split, rng.randint(*num_words))
