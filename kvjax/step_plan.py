"""What one step computes, as the scheduler hands it to the runner."""

import dataclasses
from typing import Any

import numpy as np

from kvjax.sequence import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Portion:
    """Tokens of one sequence computed this step: those of `[start, stop)` that are not reused."""

    sequence: Sequence
    start: int
    stop: int
    samples: bool  # the last token's logits give the next token
    scores_prompt: bool  # every token's logits are wanted (prompt logprobs)
    reused: tuple[tuple[int, int], ...] = ()  # spans within, whose KV is there already

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""
        return self.stop - self.start - sum(b - a for a, b in self.reused)

    @property
    def ends_prompt(self) -> bool:
        """Whether the last prompt token is in it."""
        return self.start < self.sequence.num_prompt <= self.stop

    @property
    def indices(self) -> np.ndarray:
        """Their indices in the sequence, i32, ascending."""
        indices = np.arange(self.start, self.stop, dtype=np.int32)
        for a, b in self.reused:
            indices = indices[(indices < a) | (indices >= b)]
        return indices


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. First the copies, then the moves of stored KV, then tokens are computed; `loads`
    are seats to be set up. A staged prefill has a step of its own."""

    portions: tuple[Portion, ...]
    copies: tuple[tuple[int, int], ...]  # (source page, destination page)
    loads: tuple[Sequence, ...]
    moves: tuple[tuple[Sequence, Any], ...] = ()  # (whose, `kvjax.reuse.assemble.Move`)
    staged: Sequence | None = None  # its assembly has the stages
    repairs: bool = False  # the stages are those of its repair instead

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """Everybody who takes part."""
        own = tuple(portion.sequence for portion in self.portions)
        return own if self.staged is None else (*own, self.staged)

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""
        return sum(portion.num_tokens for portion in self.portions)


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What one step and one sequence may hold."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_scored_tokens: int  # rows of a step whose prompt logprobs are wanted


class Draft:
    """A step being put together: what is left to give away, and what is taken."""

    def __init__(self, budget: int) -> None:
        self.budget, self.num_tokens = budget, 0
        self.portions: list[Portion] = []
        self.copies: list[tuple[int, int]] = []
        self.loads: list[Sequence] = []
        self.moves: list[tuple[Sequence, Any]] = []
        self.held: list[int] = []  # pages that keep their content until the step is planned
        self.staged: Sequence | None = None
        self.starts: dict[Sequence, int] = {}
        self.deferred = 0
