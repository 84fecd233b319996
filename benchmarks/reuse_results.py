"""The result file of `bench reuse`: a manifest, then one JSON line per measurement.

A line is written whole, right after its measurement, so that an interrupted run leaves what it has;
`resume` continues it and measures nothing twice. Failures are lines too, and are tried again.
"""

import dataclasses
import fcntl
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from kvjax.benchmarks import reuse_reading
from kvjax.benchmarks.corpora import Generation
from kvjax.benchmarks.reuse_reading import Reading

VERSION = 1
SETTINGS = ("split", "size", "seed", "about")  # of a run; a resumed one must have the same
Key = tuple[str, str, str]  # corpus, item, method


@dataclasses.dataclass
class Results:
    """Everything in a result file. Readings are added, never replaced."""

    manifest: dict[str, Any]
    readings: dict[Key, Reading]
    errors: dict[Key, str]  # what failed and was not measured later
    generations: dict[str, Generation]  # prompt -> message, for corpora with messages of the model

    def __post_init__(self) -> None:
        self._groups: dict[tuple[str, str], dict[str, Reading]] = {}
        self._num_grouped = 0

    def of(self, corpus: str, method: str) -> dict[str, Reading]:
        """Readings by item."""
        for (c, item, m), reading in itertools.islice(
            self.readings.items(), self._num_grouped, None
        ):
            self._groups.setdefault((c, m), {})[item] = reading
        self._num_grouped = len(self.readings)
        return self._groups.get((corpus, method), {})

    def paired(
        self, corpus: str, columns: Sequence[tuple[str, Callable[[Reading], float]]]
    ) -> list[list[float]] | None:
        """A row per (method, metric), all over the items that every method has; None for none."""
        found = [self.of(corpus, method) for method, _ in columns]
        items = [item for item in found[0] if all(item in readings for readings in found)]
        rows = zip(found, columns, strict=True)
        return [[of(readings[i]) for i in items] for readings, (_, of) in rows] if items else None

    @property
    def corpora(self) -> list[str]:
        """Corpora that have readings or errors, in the order of the run."""
        return list(dict.fromkeys(key[0] for key in (*self.readings, *self.errors)))

    def methods(self, corpus: str) -> list[str]:
        """Methods that have readings or errors on a corpus, in the order of the run."""
        keys = (*self.readings, *self.errors)
        return list(dict.fromkeys(method for c, _, method in keys if c == corpus))


class ResultFile:
    """Appends to a result file. Use it in a `with`; only one run at a time may hold a file.

    Args:
      settings: what makes two runs the same run, a value for each of `SETTINGS`.
      manifest: anything else that is known; of a resumed run, the file's own is kept.
      resume: continue what is there, after cutting off a torn last line. Else the file must be new.

    Raises `ValueError` for a file that exists, is no result, is of other settings, or is held.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        manifest: Mapping[str, Any],
        *,
        resume: bool = False,
    ) -> None:
        assert set(settings) == set(SETTINGS), settings
        if path.exists() and not resume:
            raise ValueError(f"{path} exists; --resume continues it")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file: IO[bytes] = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.results = self._continue(settings, manifest)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{path} is being written by another run") from None
        except BaseException:
            self._file.close()
            raise

    def add(self, key: Key, reading: Reading) -> None:
        """Keeps one reading; it replaces an error of the same key."""
        self._write({**_named(key), "reading": reading.as_json()})
        self.results.readings[key] = reading
        self.results.errors.pop(key, None)

    def fail(self, key: Key, error: Exception) -> None:
        """Keeps why there is no reading; it never becomes a number."""
        text = f"{type(error).__name__}: {error}"[:500]
        self._write({**_named(key), "error": text})
        self.results.errors[key] = text

    def keep(self, prompts: Sequence[str], generations: Sequence[Generation]) -> None:
        """Keeps messages of the model, so that a resumed run has the same ones."""
        for prompt, made in zip(prompts, generations, strict=True):
            if prompt not in self.results.generations:
                ids = list(made.token_ids)
                self._write({"prompt": prompt, "text": made.text, "token_ids": ids})
                self.results.generations[prompt] = made

    def note(self, name: str, value: Any) -> None:
        """Adds a value to the manifest, or checks it: another value than a kept one is refused."""
        known = self.results.manifest
        if name in known and known[name] != value:
            raise ValueError(f"{self.path} has another {name}: {known[name]!r}, not {value!r}")
        if name not in known:
            self._write({"note": name, "value": value})
            known[name] = value

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def _continue(self, settings: Mapping[str, Any], manifest: Mapping[str, Any]) -> Results:
        whole = _whole_lines(self.path)
        self._file.truncate(sum(map(len, whole)))
        if not whole:
            first = {"version": VERSION, **manifest, **settings}
            self._write({"manifest": first})
            return Results(json.loads(json.dumps(first)), {}, {}, {})
        found = _parsed(self.path, whole)
        for name, value in json.loads(json.dumps(dict(settings))).items():
            if found.manifest.get(name) != value:
                raise ValueError(
                    f"{self.path} was measured with {name} {found.manifest.get(name)!r}, "
                    f"not {value!r}"
                )
        return found

    def _write(self, fields: Mapping[str, Any]) -> None:
        data = json.dumps(fields, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        before = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(data)
            if written != len(data):
                raise OSError(f"{self.path}: {written} of {len(data)} bytes written; disk full?")
        except OSError:
            self._file.truncate(before)
            raise


def read(path: Path) -> Results:
    """What a file holds; a torn last line is left out. Raises `ValueError` for no result file."""
    return _parsed(path, _whole_lines(path))


def _whole_lines(path: Path) -> list[bytes]:
    lines = path.read_bytes().splitlines(keepends=True)
    return lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines


def _parsed(path: Path, lines: Sequence[bytes]) -> Results:
    results = Results({}, {}, {}, {})
    for number, fields in enumerate(_objects(path, lines), start=1):
        try:
            _take(results, fields, first=number == 1)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number} is no line of a reuse result: {error}") from error
    if not results.manifest:
        raise ValueError(f"{path} is no reuse result: it has no manifest")
    return results


def _objects(path: Path, lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number} is no JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{path}:{number} is no object")
        yield fields


def _take(results: Results, fields: dict[str, Any], *, first: bool) -> None:
    if first:
        results.manifest = fields["manifest"]
        if results.manifest["version"] != VERSION:
            raise ValueError(f"version {results.manifest['version']}, expected {VERSION}")
    elif "note" in fields:
        results.manifest[fields["note"]] = fields["value"]
    elif "prompt" in fields:
        made = Generation(fields["text"], tuple(fields["token_ids"]))
        results.generations[fields["prompt"]] = made
    else:
        key = (fields["corpus"], fields["item"], fields["method"])
        if "error" in fields:
            results.errors[key] = fields["error"]
        else:
            results.readings[key] = reuse_reading.from_json(fields["reading"])
            results.errors.pop(key, None)


def _named(key: Key) -> dict[str, str]:
    return dict(zip(("corpus", "item", "method"), key, strict=True))
