"""What a caller asks for and what comes back. Host-only: names and defaults follow vLLM."""

import dataclasses
import json
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from kvjax.errors import KVJaxError

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_LOGPROBS = 20  # alternatives a step can report per position
MAX_BRANCHES = 16384  # largest `n`
MAX_STOP_TOKEN_IDS = 24  # a step bans at most 32 ids, the model's own end tokens included
MAX_LOGIT_BIAS = 100.0  # largest magnitude of one entry of `logit_bias`


class FrozenMapping(Mapping[Any, Any]):
    """Hashable, immutable mapping. Lists, sets and mappings among the values are frozen too."""

    def __init__(self, items: Mapping[Any, Any]) -> None:
        self._items = {key: _freeze(value) for key, value in items.items()}

    def __getitem__(self, key: Any) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Part of a prompt whose KV is stored by itself and reused wherever it appears again.

    Text is tokenised by itself, without special tokens, wherever it stands.
    """

    content: str | tuple[int, ...]  # text, or token ids

    def __post_init__(self) -> None:
        if not isinstance(self.content, str):
            object.__setattr__(self, "content", _token_ids("a chunk", self.content))
        if not self.content:
            raise ValueError(f"a chunk must not be empty, got {self.content!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """What a completion must be: exactly one of these. Checked when made (`ValueError`)."""

    json: str | Mapping[str, Any] | None = None  # a JSON schema; kept as text
    json_object: bool = False  # any JSON object
    regex: str | None = None
    choice: Sequence[str] | None = None  # kept as a tuple
    grammar: str | None = None  # Lark, with the rule `start`

    def __post_init__(self) -> None:
        if self.choice is not None:
            choice = _strings("choice", self.choice)
            if not choice:
                raise ValueError("choice must hold at least one string, got []")
            object.__setattr__(self, "choice", choice)
        if isinstance(self.json, Mapping):
            object.__setattr__(self, "json", json.dumps(self.json))
        for name in ("json", "regex", "grammar"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name} must be a non-empty string, got {value!r}")
        given = [
            f.name for f in dataclasses.fields(self) if getattr(self, f.name) not in (None, False)
        ]
        if len(given) != 1:
            raise ValueError(
                f"structured outputs are exactly one of json, json_object, regex, choice, grammar; "
                f"got {given}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to generate from one prompt. Immutable, hashable, checked when made (`ValueError`).

    A temperature below 1e-5 is greedy. Filters act in this order: bad words, `min_tokens`, biases,
    penalties, temperature, `min_p`, `top_k`, `top_p`; tokens tied with the last kept one are kept.
    """

    n: int = 1  # completions of the prompt; they share its KV
    max_tokens: int | None = 16  # None: up to the context length
    min_tokens: int = 0  # no end or stop token before that many
    temperature: float = 1.0
    top_p: float = 1.0  # smallest set of tokens with at least this probability
    top_k: int = 0  # most likely tokens; 0 or -1: all
    min_p: float = 0.0  # least probability, relative to the most likely token
    presence_penalty: float = 0.0  # on tokens of the output
    frequency_penalty: float = 0.0  # the same, times their count
    repetition_penalty: float = 1.0  # on tokens of prompt and output
    seed: int | None = None  # None (or -1): the engine picks one
    branch: int = 0  # number of the first completion: n=1, branch=2 repeats the third one of n=3
    stop: str | Sequence[str] | None = None  # kept as a tuple
    stop_token_ids: Sequence[int] | None = None  # kept as a tuple
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives per output token, 0..20
    prompt_logprobs: int | None = None  # the same per prompt token
    logit_bias: Mapping[int, float] | None = None  # token id -> added to its logit
    allowed_token_ids: Sequence[int] | None = None  # kept as a tuple; None: all
    bad_words: Sequence[str] | None = None  # kept as a tuple
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None  # or its fields
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    priority: int = 0  # lower is scheduled first
    cache_salt: str | None = None  # KV is shared only between requests of one salt
    skip_reading_prefix_cache: bool = False
    reuse: Any = None  # spec or `kvjax.reuse.Strategy` for the prompt's chunks; None: the engine's
    extra_args: Mapping[str, Any] | None = None  # for logit stages and strategies from outside

    def __post_init__(self) -> None:
        for name, low, high in _INTEGERS:
            self._set(name, _integer(name, getattr(self, name), low, high))
        for name, low, high, open_low in _NUMBERS:
            self._set(name, _number(name, getattr(self, name), low, high, open_low=open_low))
        for name, low, high in _OPTIONAL_INTEGERS:
            value = getattr(self, name)
            if name == "seed" and value == -1:
                value = None
            self._set(name, None if value is None else _integer(name, value, low, high))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be <= max_tokens={self.max_tokens}, got {self.min_tokens}"
            )
        self._set("stop", _strings("stop", self.stop))
        self._set("bad_words", _strings("bad_words", self.bad_words))
        stop_ids = _token_ids("stop_token_ids", self.stop_token_ids or ())
        if len(stop_ids) > MAX_STOP_TOKEN_IDS:
            raise ValueError(
                f"stop_token_ids must hold at most {MAX_STOP_TOKEN_IDS} ids, got {len(stop_ids)}"
            )
        self._set("stop_token_ids", stop_ids)
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise ValueError("allowed_token_ids must hold at least one id (None: all), got []")
            self._set("allowed_token_ids", allowed)
        if self.logit_bias is not None:
            self._set("logit_bias", _logit_bias(self.logit_bias))
        if self.structured_outputs is not None:
            self._set("structured_outputs", _structured(self.structured_outputs))
        if self.cache_salt is not None and (
            not isinstance(self.cache_salt, str) or not self.cache_salt
        ):
            raise ValueError(f"cache_salt must be a non-empty string, got {self.cache_salt!r}")
        if self.extra_args is not None:
            if not isinstance(self.extra_args, Mapping) or not all(
                isinstance(key, str) for key in self.extra_args
            ):
                raise ValueError(
                    f"extra_args must be a mapping with string keys, got {self.extra_args!r}"
                )
            self._set("extra_args", FrozenMapping(self.extra_args))

    def validate_for(self, vocab_size: int, max_model_len: int) -> None:
        """Checks what depends on the model: token ids and lengths. Raises `ValueError`."""
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token_id in getattr(self, name) or ():
                if token_id >= vocab_size:
                    raise ValueError(
                        f"{name} must hold ids below the vocabulary size {vocab_size}, "
                        f"got {token_id}"
                    )
        if self.min_tokens >= max_model_len:
            raise ValueError(
                f"min_tokens must be below max_model_len={max_model_len}, got {self.min_tokens}"
            )

    @property
    def uses_penalties(self) -> bool:
        """Whether the counts of prompt and output tokens matter."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    @property
    def uses_bias(self) -> bool:
        """Whether some token has a bias, or is not allowed at all."""
        return bool(self.logit_bias) or self.allowed_token_ids is not None

    @property
    def needs_seat_features(self) -> bool:
        """Whether the request's seat must be loaded before its first draw (`decode.load_seat`)."""
        return self.uses_penalties or self.uses_bias or bool(self.bad_words)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # normalises; only __post_init__ calls it


@dataclasses.dataclass(frozen=True, slots=True)
class Logprob:
    """How likely one token was at one position, before penalties and filters."""

    logprob: float
    rank: int  # 1 + number of tokens that were more likely
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]  # token id -> its entry; the token that came is always in


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One completion: complete if `finish_reason` is set, else what there is so far."""

    index: int  # 0..n-1
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None  # None unless logprobs were asked for
    logprobs: tuple[PositionLogprobs, ...] | None = None  # one per token of `token_ids`
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token id; None: an end token

    @property
    def finished(self) -> bool:
        """Whether no token will follow."""
        return self.finish_reason is not None


@dataclasses.dataclass(slots=True, kw_only=True)
class RequestMetrics:
    """When things happened to one request, in seconds of the engine's clock. Filled as it runs."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_output_tokens: int = 0  # over all completions
    num_preemptions: int = 0

    @property
    def time_in_queue(self) -> float | None:
        """Seconds from arrival to the first step that computed a token of the prompt."""
        return _elapsed(self.arrival_time, self.first_scheduled_time)

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first output token."""
        return _elapsed(self.arrival_time, self.first_token_time)

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds between output tokens after the first; None before there are two."""
        elapsed = _elapsed(self.first_token_time, self.finished_time)
        if elapsed is None or self.num_output_tokens < 2:
            return None
        return elapsed / (self.num_output_tokens - 1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """The state of one request: final if `finished`, else a snapshot while it streams."""

    request_id: str
    prompt: str | None  # None if ids were given
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None  # the first entry is None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0  # prompt tokens whose KV was reused
    reuse: Any = None  # `kvjax.reuse.report.ReuseReport` of a prompt with chunks
    error: KVJaxError | None = None  # why it failed, if a finish_reason is "error"


_INTEGERS = (  # name, least, most
    ("n", 1, MAX_BRANCHES),
    ("branch", 0, 2**30),
    ("min_tokens", 0, 2**31 - 1),
    ("top_k", -1, 2**31 - 1),
    ("priority", -(2**63), 2**63 - 1),
)
_OPTIONAL_INTEGERS = (
    ("max_tokens", 1, 2**31 - 1),
    ("seed", 0, 2**64 - 1),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
)
_NUMBERS = (  # name, least, most, least excluded
    ("temperature", 0.0, math.inf, False),
    ("top_p", 0.0, 1.0, True),
    ("min_p", 0.0, 1.0, False),
    ("presence_penalty", -2.0, 2.0, False),
    ("frequency_penalty", -2.0, 2.0, False),
    ("repetition_penalty", 0.0, math.inf, True),
)
_FLAGS = (
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "skip_reading_prefix_cache",
)


_TINY, _HUGE = 1.2e-38, 3.4e38  # the device computes in float32


def _integer(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be an integer in [{low}, {high}], got {value!r}")
    number = int(value)
    if not low <= number <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
    return number


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> float:
    limit = f"{'(' if open_low else '['}{low}, {high}{']' if math.isfinite(high) else ')'}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number in {limit}, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    outside = not low <= number <= high or abs(number) > _HUGE or (open_low and number < _TINY)
    if outside or not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number in {limit}, got {value!r}")
    return number


def _strings(name: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Iterable) or isinstance(strings, bytes):
        raise ValueError(f"{name} must be a string or a list of strings, got {value!r}")
    strings = tuple(strings)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(f"{name} must hold non-empty strings only, got {string!r}")
    return strings


def _structured(value: object) -> StructuredOutputs:
    if isinstance(value, StructuredOutputs):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"structured_outputs must be StructuredOutputs, got {value!r}")
    unknown = set(value) - {field.name for field in dataclasses.fields(StructuredOutputs)}
    if unknown:
        raise ValueError(f"structured_outputs has no {sorted(map(str, unknown))}")
    return StructuredOutputs(**value)


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise ValueError(f"{name} must be a list of token ids, got {value!r}")
    return tuple(_integer(f"each id in {name}", token_id, 0, 2**31 - 1) for token_id in value)


def _logit_bias(value: object) -> FrozenMapping:
    if not isinstance(value, Mapping):
        raise ValueError(f"logit_bias must map token ids to numbers, got {value!r}")
    bias = {}
    for token_id, number in value.items():
        token_id = _integer("each id in logit_bias", token_id, 0, 2**31 - 1)
        name = f"logit_bias[{token_id}]"
        bias[token_id] = _number(name, number, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
    return FrozenMapping(bias)


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return FrozenMapping(value)
    if isinstance(value, list | tuple):
        return tuple(_freeze(item) for item in value)
    return frozenset(value) if isinstance(value, set) else value


def _elapsed(start: float | None, stop: float | None) -> float | None:
    return None if start is None or stop is None else stop - start
