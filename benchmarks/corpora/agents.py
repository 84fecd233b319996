"""C3, agents: several roles read the same messages, which the model itself wrote, greedily.

A problem, the notes of two agents on it, then the reading role's question. Problems of a split have
one wording per template, so that messages of one place resemble each other.
"""

import dataclasses
import random

from kvjax.benchmarks.corpora import words
from kvjax.benchmarks.corpora.item import (
    NUM_WARM_UP,
    SIZES,
    Corpus,
    Generate,
    Item,
    Passage,
    chat_head,
    chat_tail,
    halves,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Role:
    """An agent that reads: its system text, its question, its begun answer."""

    name: str
    system: str
    question: str
    lead: str


ROLES = (  # even ones tune, odd ones are held out
    Role("checker", "You are the checker. You compare the notes of others and look for mistakes.",
         "Which number is right?", "After checking, the number is "),
    Role("judge", "You are the judge. You hear both sides and then you decide alone.",
         "What is your decision on the number?", "My decision is "),
    Role("clerk", "You are the clerk. You enter results in the book, without words around them.",
         "What do you enter?", "The entry is "),
    Role("messenger", "You are the messenger. You carry results to people without time to read.",
         "What do you tell them?", "The result is "),
    Role("teacher", "You are the teacher. You kindly explain to children what is known.",
         "What do you tell the class the answer is?", "Dear class, the answer is "),
    Role("reporter", "You are the reporter. You write one line for the evening paper.",
         "Which number goes into the headline?", "The headline number is "),
    Role("auditor", "You are the auditor. You trust nobody and you count everything again.",
         "What is the count?", "The count is "),
    Role("host", "You are the host of a quiz. You read out solutions to a large audience.",
         "Which number do you read out?", "And the number is "),
)  # fmt: skip

WRITERS = (  # even ones tune, odd ones are held out
    "You solve problems step by step and show every step in plain words.",
    "You first restate the problem, then you compute, then you state the result.",
    "You explain problems to a friend, with an example from daily life.",
    "You describe how you would count the things with your hands, one after another.",
)

PROBLEMS = (  # even ones tune, odd ones are held out; c things of a go or come
    ("apples", "{name} has {a} apples and gives away {c} of them. How many apples are left?", -1),
    ("trees", "{name} has {a} trees and plants {c} more. How many trees are there now?", 1),
    ("pencils", "{name} has {a} pencils and finds {c} more. How many pencils are there now?", 1),
    ("books", "{name} has {a} books and lends out {c} of them. How many books remain?", -1),
)


def build(split: str, size: str, seed: int, generate: Generate) -> Corpus:
    """The corpus of a split. Every message is generated once, by `generate`, in one call."""
    shape = SIZES[size]
    rng = random.Random(f"agents {split} {size} {seed}")
    part = halves(split)
    roles, writers, wordings = ROLES[part], WRITERS[part], PROBLEMS[part]
    num_problems = (shape.items + NUM_WARM_UP) // len(roles)
    names = _names(rng, split, num_problems)
    problems: list[tuple[str, Passage, str]] = []
    for at, name in enumerate(names):
        template, wording, sign = wordings[at % len(wordings)]
        a, c = rng.randint(6, 12), rng.randint(2, 5)
        text = wording.format(name=name, a=a, c=c) + "\n"
        problem = Passage(f"agents-{split}-{at}", text)
        problems.append((template, problem, str(a + sign * c)))
    prompts = [
        chat_head(writer) + problem.text + chat_tail("")
        for _, problem, _ in problems
        for writer in writers
    ]
    generations = generate(prompts, shape.message_tokens)
    if len(generations) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts gave {len(generations)} generations")
    written = iter(zip(prompts, generations, strict=True))
    items: list[Item] = []
    for template, problem, answer in problems:
        messages = [
            Passage(f"{problem.id}.{at}", made.text, source=prompt, token_ids=tuple(made.token_ids))
            for at, (prompt, made) in zip(range(len(writers)), written, strict=False)
        ]
        for turn, role in enumerate(roles):
            order = messages if turn % 2 == 0 else messages[::-1]
            items.append(
                Item(
                    id=f"agents-{split}-{len(items)}",
                    corpus="agents",
                    template=template,
                    system=role.system,
                    passages=(problem, *order),
                    question=role.question,
                    lead=role.lead,
                    answers=(answer,),
                    needs=(0,),
                    role=role.name,
                )
            )
    return Corpus("agents", tuple(items[: shape.items]), tuple(items[shape.items :]))


def _names(rng: random.Random, split: str, count: int) -> list[str]:
    groups = words.people(rng, split, -(-count // 20), 20)
    return [name for group in groups for name in group][:count]
