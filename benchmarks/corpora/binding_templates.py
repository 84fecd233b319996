"""How C2 binds: sentences that define a word, sentences that use it, and the question."""

import dataclasses

from kvjax.benchmarks.corpora import words


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """`define` ties alias to meaning, `use` ties alias to number; the question has the meaning.

    Four topics of three aliases share a template.
    """

    name: str
    define: str
    use: str
    question: str
    lead: str
    aliases: tuple[str, ...]
    meanings: tuple[str, ...] = ()  # empty: people


def _all(pattern: str, names: str) -> tuple[str, ...]:
    return tuple(pattern.format(name) for name in names.split())


TEMPLATES = (  # even ones tune, odd ones are held out
    Template(
        name="keeper",
        define="In the notes below, {alias} is {meaning}.",
        use="The key of {alias} opens locker {number}.",
        question="Which locker does the key of {meaning} open?",
        lead="The key of {meaning} opens locker ",
        aliases=_all(
            "the {}",
            "Keeper Warden Steward Herald Bursar Provost Sexton Usher Beadle Almoner Chancellor "
            "Marshal",
        ),
    ),
    Template(
        name="captain",
        define="Throughout this log, {alias} means {meaning}.",
        use="{alias} sleeps in cabin {number}.",
        question="In which cabin does {meaning} sleep?",
        lead="{meaning} sleeps in cabin ",
        aliases=_all(
            "the {}",
            "Captain Bosun Purser Mate Gunner Surgeon Carpenter Cooper Cook Lookout Helmsman "
            "Stoker",
        ),
    ),
    Template(
        name="town",
        define="In this report, {alias} stands for {meaning}.",
        use="The ferry to {alias} leaves from pier {number}.",
        question="From which pier does the ferry to {meaning} leave?",
        lead="The ferry to {meaning} leaves from pier ",
        aliases=_all(
            "Point {}", "Alpha Bravo Delta Echo Foxtrot Golf Kilo Lima Oscar Sierra Tango Victor"
        ),
        meanings=words.TOWNS[::2],
    ),
    Template(
        name="order",
        define="In the order book, {alias} stands for the {meaning}.",
        use="The price of {alias} is {number}.",
        question="What is the price of the {meaning}?",
        lead="The price of the {meaning} is ",
        aliases=_all("item {}", "Q Z K X J V W H R Y N U"),
        meanings=words.INSTRUMENTS[:12],
    ),
    Template(
        name="agent",
        define="The agent called {alias} is {meaning}.",
        use="{alias} travels with passport {number}.",
        question="With which passport does {meaning} travel?",
        lead="{meaning} travels with passport ",
        aliases=_all(
            "{}", "Falcon Badger Otter Raven Panther Cobra Heron Lynx Moose Walrus Gecko Bison"
        ),
    ),
    Template(
        name="actor",
        define="In the play, {alias} is {meaning}.",
        use="{alias} waits in dressing room {number}.",
        question="In which dressing room does {meaning} wait?",
        lead="{meaning} waits in dressing room ",
        aliases=_all(
            "the {}",
            "King Queen Prince Fool Witch Ghost Soldier Nurse Hermit Knight Beggar Wizard",
        ),
    ),
    Template(
        name="guest",
        define="At this table, {alias} is {meaning}.",
        use="{alias} sits in chair {number}.",
        question="In which chair does {meaning} sit?",
        lead="{meaning} sits in chair ",
        aliases=_all(
            "the {}",
            "Baron Duke Count Admiral Colonel Bishop Mayor Senator Doctor Lawyer Banker Poet",
        ),
    ),
    Template(
        name="smith",
        define="On this farm, {alias} is {meaning}.",
        use="{alias} lives in house {number}.",
        question="In which house does {meaning} live?",
        lead="{meaning} lives in house ",
        aliases=_all(
            "the {}",
            "Smith Shepherd Miller Tanner Weaver Potter Saddler Thatcher Brewer Farrier Sawyer "
            "Beekeeper",
        ),
    ),
)
