"""Batch files: a line in is a prompt, a line out is its record, and a run can be continued.

In: JSONL (one object a line) or plain text (one prompt a line); blank lines are skipped. A line is
known by its number and the SHA-256 of its bytes, so an interrupted run continues where it was, and
a changed input is noticed. Out: one JSON object a line, written by one system call, so that
whatever interrupts a run leaves whole records.
"""

import dataclasses
import difflib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

from kvjax.intake import Prompt
from kvjax.marked import is_marked, part_of
from kvjax.request import CompletionOutput, Logprob, RequestOutput, SamplingParams
from kvjax.reuse.report import ReuseReport

_PROMPT_FIELDS = ("prompt", "prompt_token_ids", "messages")
_PARAM_FIELDS = tuple(field.name for field in dataclasses.fields(SamplingParams))
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """One line of an input that is not blank."""

    number: int  # from 1, blank lines counted
    data: bytes  # without the line end

    @property
    def sha256(self) -> str:
        """Hex digest of `data`."""
        return hashlib.sha256(self.data).hexdigest()


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """What a line asks for."""

    prompt: Prompt
    params: SamplingParams
    id: Any = None  # the line's own, any JSON value


def read_lines(stream: Iterable[bytes]) -> Iterator[Line]:
    """The lines of a binary stream that are not blank, one at a time."""
    for number, data in enumerate(stream, start=1):
        if number == 1:
            data = data.removeprefix(_BYTE_ORDER_MARK)
        data = data.rstrip(b"\r\n")
        if data.strip():
            yield Line(number, data)


def parse_text(line: Line, defaults: SamplingParams) -> Job:
    """The line as a prompt. Raises `ValueError` if it is no UTF-8."""
    return Job(_decoded(line), defaults)


def parse_json(line: Line, defaults: SamplingParams) -> Job:
    """The line as an object: a prompt, perhaps an "id", and fields of `SamplingParams`.

    Fields that the line does not set are those of `defaults`. Raises `ValueError` that says what
    is wrong with it.
    """
    try:
        fields = json.loads(_decoded(line), parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from error
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError(f"a line is an object, got {type(fields).__name__}")
    given = [name for name in _PROMPT_FIELDS if name in fields]
    if len(given) != 1:
        found = given or sorted(fields)
        raise ValueError(f"wanted one of {', '.join(_PROMPT_FIELDS)}, got {', '.join(found)}")
    prompt = _checked_prompt(given[0], fields.pop(given[0]))
    job_id = fields.pop("id", None)
    return Job(prompt, _with(defaults, fields) if fields else defaults, job_id)


def id_of(line: Line) -> Any:
    """The "id" of a line that may be wrong otherwise; None if it has none that can be read."""
    try:
        return json.loads(line.data, parse_constant=_no_constant)["id"]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return None


def looks_like_json(line: Line) -> bool:
    """Whether a first line of unknown kind is meant as JSONL."""
    return line.data.lstrip().startswith(b"{")


def _no_constant(name: str) -> NoReturn:
    """JSON has no NaN and no infinity; Python reads them, and would write them back."""
    raise ValueError(f"not JSON: {name}")


def _decoded(line: Line) -> str:
    try:
        return line.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error


def _checked_prompt(name: str, value: Any) -> Any:
    """The prompt if its JSON type is the field's."""
    if name == "prompt" and isinstance(value, str):
        return value
    if not isinstance(value, list):
        kind = "text or a list of texts and chunks" if name == "prompt" else "a list"
        raise ValueError(f"{name} must be {kind}, got {type(value).__name__}")
    if name == "prompt":
        if not is_marked(parts := [part_of(part) for part in value]):
            raise ValueError(
                f'a prompt of parts needs a {{"chunk": text}} among them, got {value!r}'
            )
        return {name: parts}
    inner = int if name == "prompt_token_ids" else dict
    for item in value:
        if not isinstance(item, inner) or isinstance(item, bool):
            raise ValueError(f"{name} must hold {inner.__name__} items, got {item!r}")
    return {name: value}


def _with(defaults: SamplingParams, fields: dict[str, Any]) -> SamplingParams:
    for name in fields:
        if name not in _PARAM_FIELDS:
            near = difflib.get_close_matches(name, (*_PARAM_FIELDS, *_PROMPT_FIELDS, "id"), 1)
            raise ValueError(f"unknown field {name!r}{f', meant {near[0]!r}?' if near else ''}")
    if isinstance(bias := fields.get("logit_bias"), dict):  # JSON's keys are strings
        try:
            fields["logit_bias"] = {int(token_id): number for token_id, number in bias.items()}
        except ValueError:
            raise ValueError(f"logit_bias maps token ids to numbers, got {bias!r}") from None
    return dataclasses.replace(defaults, **fields)


# ---- records --------------------------------------------------------------------------------


def record(line: Line, job_id: Any, result: RequestOutput | Exception) -> dict[str, Any]:
    """What is written about a line: its completions, or why there are none."""
    head = {"id": job_id, "line": line.number, "sha256": line.sha256}
    if isinstance(result, Exception):
        return head | {"outputs": [], "error": error_record(result)}
    return head | output_record(result)


def output_record(output: RequestOutput) -> dict[str, Any]:
    """A finished request as JSON values."""
    metrics = output.metrics
    found: dict[str, Any] = {
        "outputs": [_completion(completion) for completion in output.outputs],
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
        "error": None if output.error is None else error_record(output.error),
    }
    if metrics is not None:
        names = ("time_in_queue", "time_to_first_token", "time_per_output_token",
                 "num_output_tokens", "num_preemptions")  # fmt: skip
        values = {name: getattr(metrics, name) for name in names}
        found["metrics"] = {
            n: round(v, 6) if isinstance(v, float) else v for n, v in values.items()
        }
    if output.reuse is not None:
        found["reuse"] = _reuse(output.reuse)
    if output.prompt_logprobs is not None:
        found["prompt_logprobs"] = [_position(entry) for entry in output.prompt_logprobs]
    return found


def _reuse(report: ReuseReport) -> dict[str, Any]:
    """How the prompt's KV came about: tokens by fate, for each group of layers."""
    return {
        "strategy": report.strategy,
        "layers": [dataclasses.asdict(group) for group in report.groups],
        "copied_tokens": report.copied_tokens,
        "share_run": round(report.share_run, 6),
    }


def error_record(error: Exception) -> dict[str, str]:
    """An error's type and words."""
    return {"type": type(error).__name__, "message": str(error)}


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    found: dict[str, Any] = {
        "index": completion.index,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.logprobs is not None:
        found["cumulative_logprob"] = completion.cumulative_logprob
        found["logprobs"] = [_position(entry) for entry in completion.logprobs]
    return found


def _position(entry: Mapping[int, Logprob] | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    return {
        str(token_id): {"logprob": one.logprob, "rank": one.rank, "token": one.decoded_token}
        for token_id, one in entry.items()
    }


def encode_record(fields: Mapping[str, Any]) -> bytes:
    """One line of JSON. Half surrogates, which UTF-8 has not, become JSON's own escapes."""
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"


class RecordFile:
    """Appends records to a file; knows which lines have one already.

    Use it in a `with`. Only one run at a time may hold a file. Nothing is created or replaced that
    stays if the `with` ends by an error before the first record.

    Args:
      resume: continue what is there; a torn last record is cut off. Else the file must be new, or
        `overwrite` be given.
    """

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        if path.exists() and not (resume or overwrite):
            raise ValueError(f"{path} exists; --resume continues it, --overwrite replaces it")
        self.path = path
        self.done: dict[int, str] = {}  # line number -> sha256
        self.num_failed = 0  # of them
        self._is_new = not path.exists()
        self._is_stale = overwrite  # what is there goes when the first record comes
        self._file: IO[bytes] = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if resume:
                self._file.truncate(self._read())
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{path} is being written by another run") from None
        except BaseException:
            self._file.close()
            raise

    def write(self, fields: Mapping[str, Any]) -> None:
        """Appends one record. A disk that is full leaves the file as it was."""
        data = encode_record(fields)
        self._clear()
        before = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(data)
            if written != len(data):
                raise OSError(f"{self.path}: {written} of {len(data)} bytes written; disk full?")
        except OSError:
            self._file.truncate(before)
            raise

    def has(self, line: Line) -> bool:
        """Whether the line has its record. Raises `ValueError` if that is of another line."""
        sha256 = self.done.get(line.number)
        if sha256 is not None and sha256 != line.sha256:
            raise ValueError(
                f"{self.path} has a result for another line {line.number}: the input has changed"
            )
        return sha256 is not None

    def _read(self) -> int:
        """Takes in what is there; returns the bytes of it that are whole records."""
        end = 0
        self._file.seek(0)
        with os.fdopen(os.dup(self._file.fileno()), "rb") as lines:
            for number, data in enumerate(lines, start=1):
                if not data.endswith(b"\n"):
                    break  # torn: its writer was killed
                end += len(data)
                try:
                    fields = json.loads(data)
                    self.done[int(fields["line"])] = str(fields["sha256"])
                    self.num_failed += fields["error"] is not None
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{self.path}:{number} is no record of kvjax") from error
        return end

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        if kind is None:
            self._clear()
        elif self._is_new and self._file.seek(0, os.SEEK_END) == 0:
            self.path.unlink()
        self._file.close()

    def _clear(self) -> None:
        if self._is_stale:
            self._is_stale = False
            self._file.truncate(0)


def check_resumable(lines: Iterable[Line], records: RecordFile) -> int:
    """The number of lines; raises `ValueError` if `records` is of another input."""
    count, found = 0, 0
    for line in lines:
        count += 1
        found += records.has(line)
    if found != len(records.done):
        raise ValueError(f"{records.path} has results for lines that the input lacks")
    return count
