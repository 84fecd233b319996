"""C4, schema: small databases whose foreign columns name a table and leave its key to that table.

The question names a table and its foreign column; the condition of the join needs the table (what
the column refers to) and the referred table (what its key is called).
"""

import random
from collections.abc import Callable

from kvjax.benchmarks.corpora.item import NUM_WARM_UP, SIZES, Corpus, Item, Passage, halves

SYSTEM = "These tables belong to one database. Write joins for it."
NUM_DATABASES, NUM_TABLES = 8, 10

TABLES: tuple[str, ...] = (
    "boats", "owners", "harbours", "permits", "voyages", "cargo", "crews", "repairs", "storms",
    "insurers", "libraries", "books", "readers", "loans", "shelves", "authors", "printers", "fines",
    "branches", "editions", "farms", "fields", "tractors", "crops", "buyers", "invoices", "barns",
    "seeds", "weather", "markets", "clinics", "doctors", "patients", "visits", "wards", "drugs",
    "labs", "samples", "nurses", "bills",
)  # fmt: skip
KEYS: tuple[str, ...] = (
    "serial", "ticket", "folio", "badge", "tag", "docket", "register", "stamp", "cipher", "label",
    "index", "mark", "handle", "slot", "code", "number", "token", "letter", "rank", "entry",
)  # fmt: skip
LINKS: tuple[str, ...] = (
    "kept_by", "part_of", "issued_at", "stored_in", "listed_under", "paid_by", "sent_to",
    "made_for", "led_by", "owned_by", "moved_to", "signed_by", "held_at", "taken_from", "lent_to",
    "checked_by", "sold_to", "given_by", "bound_for", "named_after",
)  # fmt: skip
COLUMNS: tuple[str, ...] = (
    "name TEXT", "opened DATE", "weight REAL", "height REAL", "notes TEXT", "colour TEXT",
    "price REAL", "closed DATE", "status TEXT", "city TEXT", "country TEXT", "rating INTEGER",
    "phone TEXT", "email TEXT", "length REAL", "width REAL", "created DATE", "kind TEXT",
    "amount REAL", "active BOOLEAN",
)  # fmt: skip


def _inline(table: str, key: str, columns: list[str], links: list[tuple[str, str]]) -> str:
    lines = [f"{key} INTEGER PRIMARY KEY", *columns]
    lines += [f"{link} INTEGER REFERENCES {parent}" for link, parent in links]
    return f"CREATE TABLE {table} ({', '.join(lines)});"


def _constraints(table: str, key: str, columns: list[str], links: list[tuple[str, str]]) -> str:
    lines = [f"{key} INTEGER", *columns, *(f"{link} INTEGER" for link, _ in links)]
    lines += [f"PRIMARY KEY ({key})"]
    lines += [f"FOREIGN KEY ({link}) REFERENCES {parent}" for link, parent in links]
    return f"CREATE TABLE {table} (\n  " + ",\n  ".join(lines) + "\n);"


def _sentences(table: str, key: str, columns: list[str], links: list[tuple[str, str]]) -> str:
    plain = ", ".join(column.split()[0] for column in columns)
    text = f"Table {table}. Its primary key is {key}. Its other columns are {plain}."
    return text + "".join(f" Its column {link} refers to the table {p}." for link, p in links)


def _bullets(table: str, key: str, columns: list[str], links: list[tuple[str, str]]) -> str:
    lines = [f"- {key} (primary key)", *(f"- {c.split()[0]}" for c in columns)]
    lines += [f"- {link} (key of {parent})" for link, parent in links]
    return f"## {table}\n" + "\n".join(lines)


def _signature(table: str, key: str, columns: list[str], links: list[tuple[str, str]]) -> str:
    fields = [f"*{key}", *(column.split()[0] for column in columns)]
    fields += [f"{link} -> {parent}" for link, parent in links]
    return f"{table}({', '.join(fields)})  -- * is the primary key"


def _mapping(table: str, key: str, columns: list[str], links: list[tuple[str, str]]) -> str:
    lines = [f"{table}:", f"  primary_key: {key}"]
    lines += [f"  columns: [{', '.join(column.split()[0] for column in columns)}]"]
    lines += [f"  {link}: references {parent}" for link, parent in links]
    return "\n".join(lines)


Style = Callable[[str, str, list[str], list[tuple[str, str]]], str]
TEMPLATES: tuple[tuple[str, Style], ...] = (  # even ones tune, odd ones are held out
    ("inline", _inline),
    ("constraints", _constraints),
    ("sentences", _sentences),
    ("bullets", _bullets),
    ("signature", _signature),
    ("mapping", _mapping),
)


class _Database:
    """A forest of tables with one more edge here and there; every table but the first refers."""

    def __init__(self, rng: random.Random, split: str, number: int) -> None:
        styles = TEMPLATES[halves(split)]
        self.template, style = styles[number % len(styles)]
        part = halves(split)
        names = rng.sample(TABLES[part], NUM_TABLES)
        self.keys = dict(zip(names, rng.sample(KEYS[part], NUM_TABLES), strict=True))
        links = iter(rng.sample(LINKS[part], NUM_TABLES))
        self.links = [
            (child, next(links), rng.choice(names[:at])) for at, child in enumerate(names) if at
        ]
        self.passages: dict[str, Passage] = {}
        for name in names:
            mine = [(link, parent) for child, link, parent in self.links if child == name]
            columns = rng.sample(COLUMNS, 4)
            self.passages[name] = Passage(
                f"schema-{split}-{number}.{name}",
                style(name, self.keys[name], columns, mine) + "\n",
                parents=tuple(f"schema-{split}-{number}.{parent}" for _, parent in mine),
            )


def build(split: str, size: str, seed: int) -> Corpus:
    """The corpus of a split: the judged items, then those that may come before."""
    shape = SIZES[size]
    rng = random.Random(f"schema {split} {size} {seed}")
    databases = [_Database(rng, split, number) for number in range(NUM_DATABASES)]
    items: list[Item] = []
    while len(items) < shape.items + NUM_WARM_UP:
        number = len(items)
        database = databases[number % NUM_DATABASES]
        turn = number // NUM_DATABASES
        child, link, parent = database.links[turn % len(database.links)]
        rest = [name for name in database.passages if name not in (child, parent)]
        chosen = [child, parent, *rng.sample(rest, shape.tables - 2)]
        rng.shuffle(chosen)
        item = Item(
            id=f"schema-{split}-{number}",
            corpus="schema",
            template=database.template,
            system=SYSTEM,
            passages=tuple(database.passages[name] for name in chosen),
            question=f"Join {child} with the table that its column {link} refers to.",
            lead=f"The condition is {child}.{link} =",
            answers=(f"{parent}.{database.keys[parent]}",),
            needs=tuple(sorted((chosen.index(child), chosen.index(parent)))),
        )
        items.append(item)
    return Corpus("schema", tuple(items[: shape.items]), tuple(items[shape.items :]))
