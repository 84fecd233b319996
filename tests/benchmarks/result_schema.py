"""The committed schema of result files, as a check."""

import json
from pathlib import Path

import jsonschema_rs

import kvjax.benchmarks

SCHEMA = json.loads((Path(kvjax.benchmarks.__path__[0]) / "schema.json").read_text())
_validator = jsonschema_rs.Draft202012Validator(SCHEMA)


def complaints(record) -> list[str]:
    """What the schema says against a result; nothing if it is one."""
    return [f"{'/'.join(map(str, e.instance_path))}: {e.message}" for e in
            _validator.iter_errors(record)]  # fmt: skip
