"""What the host knows of a running request: tokens, pages, and how far the device has come.

Intervals of a sequence's tokens, left to right:

    [0, num_computed)            KV is in `page_ids`, or will be once the dispatched steps have run
    [num_computed, len(tokens))  known on the host, still to be computed
    then `num_pending` tokens    sampled by dispatched steps, still on the device
"""

import dataclasses
import enum
from collections.abc import Sequence as Seq
from typing import Any, Protocol, Self

import numpy as np

from kvjax.errors import KVJaxError
from kvjax.request import FinishReason, PositionLogprobs, RequestMetrics, SamplingParams


class Status(enum.Enum):
    """Where a sequence is."""

    DORMANT = "dormant"  # a branch that waits for the first one to compute the prompt
    WAITING = "waiting"  # in the scheduler's queue
    RUNNING = "running"  # has a seat
    FINISHED = "finished"  # over; a parked sequence is finished and keeps its pages


class TextSink(Protocol):
    """What a sequence's tokens are told to as they come (`kvjax.text.TextStream`)."""

    def push(self, token_id: int, last: bool) -> str | None:
        """Takes the next token; returns the stop string if the text is now complete."""
        ...


class Assembled(Protocol):
    """How stored chunks serve a prompt (`kvjax.reuse.assemble.Assembly`)."""

    @property
    def moves(self) -> Seq[Any]:
        """Stored KV that is moved into the sequence's own pages."""
        ...

    @property
    def reused(self) -> tuple[tuple[int, int], ...]:
        """Spans that no ordinary step computes."""
        ...

    @property
    def staged(self) -> Any:
        """The stages of a prefill that chooses its rows on the device; None without."""
        ...

    @property
    def exact_end(self) -> int:
        """Tokens before it are as exact as a full prefill."""
        ...

    @property
    def repair(self) -> int:
        """Rows that are run again between two decode steps; then its pages are for it alone."""
        ...

    @property
    def lineage(self) -> str:
        """Either "exact", or what everything behind depends on."""
        ...

    @property
    def report(self) -> Any:
        """What becomes of each token."""
        ...

    def found(self) -> Self:
        """The same once its result is found in the cache: nothing is left to do."""
        ...


class GrammarMatcher(Protocol):
    """What a sequence's tokens must match (`kvjax.grammar.Matcher`)."""

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        ...

    def mask(self) -> np.ndarray:
        """Tokens that may come next, as bits: i32[ceil(vocab / 32)]."""
        ...

    def accept(self, token: int) -> bool:
        """Takes the token that came; False if it is not allowed."""
        ...


@dataclasses.dataclass(eq=False, slots=True)
class Request:
    """One call of the user: a prompt, its parameters, and one sequence per branch."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    metrics: RequestMetrics
    arrival: int  # order of arrival, breaks ties of priority
    prompt: str | None = None
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    sequences: list["Sequence"] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int = 0
    error: KVJaxError | None = None
    samples: bool = True  # False: only the prompt's KV is wanted
    chunk_spans: tuple[tuple[int, int], ...] = ()  # of the prompt; () also if nothing is reused
    strategy: Any = None  # `kvjax.reuse.Strategy` for them
    report: Any = None  # `kvjax.reuse.report.ReuseReport`, once scheduled
    observed: bool = False  # its strategy has seen the computed prompt

    @property
    def namespace(self) -> tuple[str | None, str]:
        """Which cached pages are valid for it: the tenant's salt, and exact lineage only."""
        return (self.params.cache_salt, "exact")

    @property
    def finished(self) -> bool:
        """Whether every branch is over."""
        return all(s.status is Status.FINISHED for s in self.sequences)


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """One branch of a request. Only the scheduler changes its pages and progress."""

    request: Request
    tokens: list[int]
    branch: int = 0  # part of the random keys; the first one's is `params.branch`
    num_prompt: int = 0
    page_ids: list[int] = dataclasses.field(default_factory=list)
    num_computed: int = 0
    num_pending: int = 0
    owns_tail: bool = True  # False: the last, partial page is shared and copied before a write
    assembly: Assembled | None = None  # how stored chunks came into its pages
    reused: tuple[tuple[int, int], ...] = ()  # spans that are moved or staged, not computed
    repair: Any = None  # `kvjax.reuse.repair.Repair`, while it decodes over reused KV
    seat: int | None = None
    status: Status = Status.DORMANT
    keeps_pages: bool = False  # parked, not released, when finished
    end_token_ids: tuple[int, ...] = ()
    text: TextSink | None = None
    grammar: GrammarMatcher | None = None
    logprobs: list[PositionLogprobs] | None = None
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def is_first(self) -> bool:
        """Whether it is the branch of its request that computes the prompt."""
        return self.request.sequences[0] is self

    @property
    def num_output(self) -> int:
        """Output tokens known on the host."""
        return len(self.tokens) - self.num_prompt

    @property
    def output_ids(self) -> tuple[int, ...]:
        """Output tokens known on the host."""
        return tuple(self.tokens[self.num_prompt :])

    @property
    def reused_ahead(self) -> int:
        """Tokens behind `num_computed` whose KV is moved there, not computed."""
        return sum(b - max(a, self.num_computed) for a, b in self.reused if b > self.num_computed)

    @property
    def scores_prompt(self) -> bool:
        """Whether logits of prompt tokens are still wanted."""
        return (
            self.request.params.prompt_logprobs is not None
            and self.is_first
            and self.num_computed < self.num_prompt
            and self.num_output == 0
        )

    @property
    def order(self) -> tuple[int, int, int]:
        """Smaller is served first and preempted last."""
        return (self.request.params.priority, self.request.arrival, self.branch)
