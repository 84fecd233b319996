"""Sentences that say nothing a question asks for: no digits, no names, the same in any order."""

import random

from kvjax.benchmarks.corpora.item import halves

_SUBJECTS = (
    "The committee", "The gardener", "A quiet neighbour", "The older clerk", "The night porter",
    "A visiting scholar", "The baker next door", "The evening class", "The repair crew",
    "A retired sailor", "The new apprentice", "The choir", "The station master", "A young painter",
    "The village band", "The mapmaker", "The librarian", "A passing trader", "The cook",
    "The stone mason", "The weather office", "The ferry crew", "A patient teacher", "The postman",
)  # fmt: skip
_VERBS = (
    "talked about the weather", "mended the old fence", "looked over the plans",
    "waited for better light", "drank a cup of tea", "sorted a pile of letters",
    "swept the front steps", "opened every window", "read from a worn book",
    "walked along the river", "asked for more paper", "made a drawing of the bridge",
    "carried firewood inside", "listened to the rain", "planted a row of beans",
    "wrote a short note",
)  # fmt: skip
_ENDINGS = (
    "before the bells rang", "while the others slept", "as the fog came in",
    "after a long summer", "without saying much", "and nobody minded",
    "until the lamps were lit", "because the road was closed", "on the first dry day",
    "in spite of the noise", "to pass the time", "with great care", "and went home early",
    "as usual", "during the long break", "just before dark",
)  # fmt: skip


def sentence(rng: random.Random, split: str) -> str:
    """One sentence of 8 to 13 words; the splits share no subject, verb or ending."""
    part = halves(split)
    words = (rng.choice(parts[part]) for parts in (_SUBJECTS, _VERBS, _ENDINGS))
    return " ".join(words) + "."


def filler(rng: random.Random, split: str, num_words: int) -> str:
    """Sentences of `num_words` in all, or up to 12 more."""
    return " ".join(_sentences(rng, split, num_words))


def passage(rng: random.Random, split: str, facts: list[str], num_words: int) -> str:
    """Filler of about `num_words` in all, with the facts at random places in their order."""
    found = _sentences(rng, split, num_words - sum(len(fact.split()) for fact in facts))
    places = sorted(rng.randrange(len(found) + 1) for _ in facts)
    for place, fact in reversed(list(zip(places, facts, strict=True))):
        found.insert(place, fact)
    return " ".join(found) + "\n"


def _sentences(rng: random.Random, split: str, num_words: int) -> list[str]:
    found: list[str] = []
    while num_words > 0:
        found.append(sentence(rng, split))
        num_words -= len(found[-1].split())
    return found
