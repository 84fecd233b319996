"""How C2 binds: a sentence that says who the next passage is about, and that passage's fact."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """`define` ends a passage, `use` starts the next; the question names the person."""

    name: str
    define: str
    use: str
    question: str
    lead: str


TEMPLATES = (  # even ones tune, odd ones are held out
    Template(
        name="keeper",
        define="In the next note, the Keeper is {person}.",
        use="The Keeper has locker {number}.",
        question="Which locker does {person} have?",
        lead="{person} has locker ",
    ),
    Template(
        name="captain",
        define="In the next log, the Captain is {person}.",
        use="The Captain sleeps in cabin {number}.",
        question="In which cabin does {person} sleep?",
        lead="{person} sleeps in cabin ",
    ),
    Template(
        name="badge",
        define="The next note is about {person}.",
        use="The badge number is {number}.",
        question="What is the badge number of {person}?",
        lead="The badge number of {person} is ",
    ),
    Template(
        name="card",
        define="The next card belongs to {person}.",
        use="The card number is {number}.",
        question="What is the card number of {person}?",
        lead="The card number of {person} is ",
    ),
    Template(
        name="desk",
        define="{person} writes the next note.",
        use="My desk is in room {number}.",
        question="In which room is the desk of {person}?",
        lead="The desk of {person} is in room ",
    ),
    Template(
        name="letter",
        define="{person} signs the next letter.",
        use="My house has the number {number}.",
        question="Which number does the house of {person} have?",
        lead="The house of {person} has the number ",
    ),
    Template(
        name="extension",
        define="Name: {person}.",
        use="Extension: {number}.",
        question="What is the extension of {person}?",
        lead="Name: {person}. Extension: ",
    ),
    Template(
        name="guest",
        define="Guest: {person}.",
        use="Room: {number}.",
        question="Which room does the guest {person} have?",
        lead="Guest: {person}. Room: ",
    ),
)
