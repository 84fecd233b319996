"""Which documents of a schema refer to which: foreign keys, read from SQL. Pure Python."""

import re
from collections.abc import Sequence
from typing import NamedTuple

# Comments and string literals say nothing about keys.
_ASIDE = re.compile(r"--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'", re.DOTALL)
_NAME = r'(?:[\w$]+|"[^"]+"|`[^`]+`|\[[^\]]+\])'
_PATH = rf"{_NAME}(?:\s*\.\s*{_NAME})*"
_CREATE = re.compile(
    rf"\bCREATE\s+(?:\w+\s+){{0,3}}?TABLE\s+(?:IF\s+NOT\s+EXISTS\s+)?({_PATH})", re.IGNORECASE
)
_REFERENCES = re.compile(rf"\bREFERENCES\s+({_PATH})", re.IGNORECASE)


class Declared(NamedTuple):
    """Names of the tables that a text creates, and of those that it refers to."""

    tables: tuple[str, ...]
    references: tuple[str, ...]


def declared(text: str) -> Declared:
    """What a text of SQL declares: `CREATE TABLE`, and `REFERENCES` in columns and constraints.

    Names are in lower case, without quotes and without the schema in front of them.
    """
    text = _ASIDE.sub(" ", text)
    tables = tuple(dict.fromkeys(_plain(m[1]) for m in _CREATE.finditer(text)))
    references = dict.fromkeys(_plain(m[1]) for m in _REFERENCES.finditer(text))
    return Declared(tables, tuple(name for name in references if name not in tables))


def _plain(path: str) -> str:
    return re.findall(_NAME, path)[-1].strip('"`[]').lower()


def foreign_keys(texts: Sequence[str]) -> list[tuple[int, ...]]:
    """For each text the numbers of those that create a table it refers to, ascending.

    Where several create a table of that name (schemas that were put together), the nearest counts,
    of two the earlier. A table that no text creates is no one's.
    """
    found = [declared(text) for text in texts]
    creators: dict[str, list[int]] = {}
    for number, one in enumerate(found):
        for table in one.tables:
            creators.setdefault(table, []).append(number)
    parents = []
    for number, one in enumerate(found):
        nearest = {
            min(creators[name], key=lambda other: (abs(other - number), other))
            for name in one.references
            if name in creators
        }
        parents.append(tuple(sorted(nearest - {number})))
    return parents


def referenced_first(parents: Sequence[Sequence[int]]) -> list[int]:
    """Every number once, those that it refers to before it. A cycle is cut where the walk, from
    small numbers to large ones, meets it again.

    Raises:
      ValueError: a parent is no number of a document.
    """
    for number, mine in enumerate(parents):
        for parent in mine:
            if not 0 <= parent < len(parents):
                raise ValueError(
                    f"document {number} refers to document {parent}; there are {len(parents)}"
                )
    order: dict[int, None] = {}
    begun: set[int] = set()
    for first in range(len(parents)):
        stack = [(first, False)]
        while stack:
            number, done = stack.pop()
            if done:
                order[number] = None
            elif number not in begun:
                begun.add(number)
                stack.append((number, True))
                stack += [(parent, False) for parent in sorted(parents[number], reverse=True)]
    return list(order)
