"""What structured output is measured on: grammars of several kinds and sizes, and texts for each.

The texts that fit are drawn from the schema itself; those that do not fit have one thing wrong.
"""

import dataclasses
import json
import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

_WORDS = ("river", "stone", "fox", "hen", "quick", "white", "north", "seven", "paper", "light")


@dataclasses.dataclass(frozen=True)
class Case:
    """A grammar of one `kind` (a field of `StructuredOutputs`), texts that fit and that do not."""

    name: str
    kind: str  # json, regex, choice, grammar
    spec: Any
    fitting: tuple[str, ...]
    unfitting: tuple[str, ...]


def record(size: int) -> Schema:
    """An object with `size` properties, all required: words, numbers, enums, dates and lists."""
    kinds: tuple[Schema, ...] = (
        {"type": "string", "maxLength": 40},
        {"type": "integer", "minimum": 0, "maximum": 9999},
        {"enum": list(_WORDS)},
        {"type": "boolean"},
        {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
        {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 5},
        {"type": "string", "format": "date"},
        {"type": "number"},
    )
    return _object({f"{_WORDS[i % 10]}_{i}": kinds[i % len(kinds)] for i in range(size)})


def nested(depth: int) -> Schema:
    """Objects and lists in each other, `depth` deep."""
    inner = record(4) if depth == 0 else nested(depth - 1)
    listed = {"type": "array", "items": inner, "minItems": 1, "maxItems": 2}
    return _object({"name": {"type": "string", "maxLength": 12}, "parts": listed})


def tools(count: int) -> Schema:
    """One of `count` calls, as a required tool choice asks for."""
    calls = [
        _object({"name": {"const": f"{_WORDS[i % 10]}_tool_{i}"}, "arguments": record(3 + i % 5)})
        for i in range(count)
    ]
    return {"anyOf": calls}


def tree() -> Schema:
    """A node that holds nodes."""
    children = {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 3}
    node = _object({"value": {"type": "integer"}, "children": children})
    return {"$ref": "#/$defs/node", "$defs": {"node": node}}


ARITHMETIC = r"""
start: sum
sum: product (("+" | "-") product)*
product: atom (("*" | "/") atom)*
atom: NUMBER | "(" sum ")"
NUMBER: /[0-9]{1,6}/
"""
QUERY = r"""
start: "SELECT " columns " FROM " NAME where? order? ";"
columns: "*" | NAME (", " NAME)*
where: " WHERE " test ((" AND " | " OR ") test)*
test: NAME " " ("=" | "<" | ">" | "<>") " " value
value: NUMBER | STRING
order: " ORDER BY " NAME (" ASC" | " DESC")?
NAME: /[a-z][a-z_]{0,20}/
NUMBER: /[0-9]{1,9}/
STRING: /'[a-zA-Z ]{0,30}'/
"""
EMAIL = r"[a-z0-9._]{1,20}@[a-z0-9-]{1,15}\.(com|org|net|io)"
LOG_LINE = (
    r"20[0-9]{2}-(0[1-9]|1[0-2])-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]Z "
    r"(DEBUG|INFO|WARNING|ERROR) [a-z_]{1,20}: [^\n]{1,80}"
)


def cases(count: int, *, quick: bool = False) -> list[Case]:
    """All cases, with `count` fitting texts each, drawn from fixed seeds.

    Args:
        quick: only the small ones.
    """
    found = [
        _json("JSON, 4 properties", record(4), count),
        _json("JSON, 32 properties", record(32), count),
        _json("JSON, nested 4 deep", nested(3), count),
        _json("JSON, a tree", tree(), count),
        _json("JSON, 1 of 16 tools", tools(16), count),
        _drawn("regex, an address", "regex", EMAIL, _address, count, ("a b@x.com", "ab@x.de")),
        _drawn("regex, a log line", "regex", LOG_LINE, _log_line, count, ("1999-01-01T00:00:00Z",)),
        _choice("choice, 4", 4, count),
        _choice("choice, 1,000", 1000, count),
        _drawn("grammar, sums", "grammar", ARITHMETIC, _sum, count, ("1+", "(1", "a+1")),
        _drawn("grammar, queries", "grammar", QUERY, _query, count, ("SELECT FROM x;", "DROP x;")),
        _json("JSON, 256 properties", record(256), count),
    ]
    return [c for c in found if c.kind != "json" or len(json.dumps(c.spec)) < 1000] if quick else (
        found
    )  # fmt: skip


def _object(properties: dict[str, Schema]) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _json(name: str, schema: Schema, count: int) -> Case:
    values = [_value(schema, schema, random.Random(i), 0) for i in range(count)]
    first = values[0]
    wrong = [{**first, "more": 1}, dict(list(first.items())[:-1]), [first], "no object"]
    return Case(name, "json", schema, tuple(map(json.dumps, values)), tuple(map(json.dumps, wrong)))


def _drawn(
    name: str,
    kind: str,
    spec: str,
    draw: Callable[[random.Random], str],
    count: int,
    unfitting: tuple[str, ...],
) -> Case:
    texts = tuple(draw(random.Random(i)) for i in range(count))
    return Case(name, kind, spec, texts, unfitting)


def _choice(name: str, size: int, count: int) -> Case:
    words = [f"{_WORDS[i % 10]} {_WORDS[i // 10 % 10]} {i}" for i in range(size)]
    dice = random.Random(0)
    fitting = tuple(dice.choice(words) for _ in range(count))
    return Case(name, "choice", words, fitting, ("river", "river river -1", "fox"))


def _value(schema: Schema, root: Schema, dice: random.Random, depth: int) -> Any:
    """A value that fits one of the schemas above."""
    if "$ref" in schema:
        return _value(root["$defs"]["node"], root, dice, depth)
    if "anyOf" in schema:
        return _value(dice.choice(schema["anyOf"]), root, dice, depth)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return dice.choice(schema["enum"])
    match schema["type"]:
        case "object":
            return {
                key: _value(inner, root, dice, depth + 1)
                for key, inner in schema["properties"].items()
            }
        case "array":
            least, most = schema.get("minItems", 0), schema["maxItems"] if depth < 6 else 0
            items = range(dice.randint(least, max(least, most)))
            return [_value(schema["items"], root, dice, depth + 1) for _ in items]
        case "string":
            return _string(schema, dice)
        case "integer":
            return dice.randint(schema.get("minimum", -99), schema.get("maximum", 99_999))
        case "number":
            return round(dice.uniform(-100, 100), 3)
    return dice.random() < 0.5


def _string(schema: Schema, dice: random.Random) -> str:
    if "pattern" in schema:
        return f"{dice.choice(('AB', 'XY'))}-{dice.randint(1000, 9999)}"
    if "format" in schema:
        return f"20{dice.randint(10, 29)}-0{dice.randint(1, 9)}-1{dice.randint(0, 9)}"
    words = " ".join(dice.choice(_WORDS) for _ in range(dice.randint(1, 6)))
    return words[: schema["maxLength"]]


def _address(dice: random.Random) -> str:
    return f"{dice.choice(_WORDS)}.{dice.randint(1, 99)}@{dice.choice(_WORDS)}-mail.org"


def _log_line(dice: random.Random) -> str:
    text = " ".join(dice.choice(_WORDS) for _ in range(dice.randint(3, 9)))
    level = dice.choice(("DEBUG", "INFO", "WARNING", "ERROR"))
    return f"2026-0{dice.randint(1, 9)}-1{dice.randint(0, 9)}T12:34:56Z {level} a_module: {text}"


def _sum(dice: random.Random, depth: int = 0) -> str:
    if depth == 3 or dice.random() < 0.2:
        return str(dice.randint(0, 9999))
    parts = (_sum(dice, depth + 1) for _ in range(2))
    return f"({dice.choice('+-*/').join(parts)})"


def _query(dice: random.Random) -> str:
    columns = ", ".join(dice.sample(_WORDS, dice.randint(1, 4)))
    tests = (
        f"{dice.choice(_WORDS)} = '{dice.choice(_WORDS)}'",
        f"{dice.choice(_WORDS)} < {dice.randint(0, 9999)}",
    )
    return f"SELECT {columns} FROM {dice.choice(_WORDS)} WHERE {' AND '.join(tests)} ORDER BY fox;"
