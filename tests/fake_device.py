"""An engine whose device is a dictionary: it knows what every KV slot holds, and checks each step.

A slot's content is (tenant, index, all tokens up to there), so whatever reads a slot that was not
written, was overwritten, or belongs to another tenant or another text, is caught at once.
"""

import dataclasses
import types
import zlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np

from kvjax import engine as engine_module
from kvjax.cache.pool import PagePool
from kvjax.decode import SampleOutput
from kvjax.engine import Engine
from kvjax.intake import Intake
from kvjax.ladder import ladder
from kvjax.runner import Dispatched, Runner, _rows
from kvjax.sequence import Request, Sequence, Status
from kvjax.step_plan import Limits, StepPlan
from tests.tiny_model import LetterTokenizer

PAGE, NUM_LETTERS, END = 4, 4, 0


def next_token(seed: int, branch: int, tokens: list[int] | tuple[int, ...]) -> int:
    """What the "model" draws: 0 (the end) one time in nine, else a letter."""
    draw = zlib.crc32(repr((seed, branch, tuple(tokens))).encode())
    return END if draw % 9 == 0 else 1 + draw % (NUM_LETTERS - 1)


def truth(sequence: Sequence, length: int) -> list[int]:
    """The first `length` tokens, those included that are still on the device."""
    tokens = list(sequence.tokens)
    while len(tokens) < length:
        tokens.append(next_token(sequence.request.seed, sequence.branch, tokens))
    return tokens[:length]


def content(request: Request, tokens: list[int]) -> tuple[Any, ...]:
    return (request.namespace, len(tokens), tuple(tokens))


class DeviceArray:
    """Results of a step; reading them may be what raises."""

    def __init__(self, values: Any, error: Exception | None, read: Callable[[], None]) -> None:
        self.values, self.error, self.read = values, error, read

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if self.error is not None:
            raise self.error
        self.read()
        return self.values


class FakeRunner:
    """Takes the place of `Runner`. `fail_next` is "dispatch" or "read": the next step raises."""

    _bucket = Runner._bucket

    def __init__(
        self, model: Any, spec: Any, num_pages: int, limits: Limits, cascade: bool
    ) -> None:
        self.limits, self.num_pages = limits, num_pages
        self.pool = PagePool(num_pages, PAGE)  # the engine's, once there is one
        self.buckets = ladder(limits)
        self.fail_next: str | None = None
        self.mode = "read"
        self.blamed: set[Request] = set()  # were alone in a step that raised without their fault
        self.lost = False
        self.num_steps = self.num_computed = self.num_copies = 0
        self.rebuild()

    def rebuild(self) -> None:
        self.slots: dict[int, tuple[Any, ...]] = {}
        self.last_tokens: dict[int, int] = {}
        self.loaded: dict[int, Sequence] = {}
        self.in_flight: list[StepPlan] = []
        self.writers: dict[int, Sequence] = {}  # page -> who writes it
        self.claims: dict[int, set[Any]] = {}  # slot -> who relied on it at the last audit
        self.lost = False

    def dispatch(self, plan: StepPlan) -> Dispatched:
        bucket = self._bucket(plan)
        if self.lost:  # its inputs are what the failed step did not give
            out, owners = self._sample(plan)
            out = dataclasses.replace(out, tokens=DeviceArray(out.tokens, self.error, lambda: None))
            return Dispatched(plan, owners, out, bucket)
        for sequence in plan.loads:
            assert sequence.seat is not None
            self.loaded[sequence.seat] = sequence
        self._check_limits(plan)
        self.num_steps += 1
        self._copy(plan)
        self._write(plan)
        self._read(plan)
        out, owners = self._sample(plan)
        error = self._error(plan)
        self.in_flight.append(plan)
        if error is not None:
            self.lost, self.error = True, error
            if self.mode == "dispatch":
                raise error
        out = dataclasses.replace(
            out, tokens=DeviceArray(out.tokens, error, lambda: self._has_read(plan))
        )
        return Dispatched(plan, owners, out, bucket)

    def _has_read(self, plan: StepPlan) -> None:
        self.in_flight = [other for other in self.in_flight if other is not plan]

    def _check_limits(self, plan: StepPlan) -> None:
        limits, portions = self.limits, plan.portions
        assert 0 < plan.num_tokens <= limits.max_num_batched_tokens
        assert len(portions) <= limits.max_num_seqs
        assert len({id(c.sequence) for c in portions}) == len(portions)
        assert len({c.sequence.seat for c in portions}) == len(portions)
        for portion in portions:
            sequence = portion.sequence
            assert sequence.status is Status.RUNNING
            assert sequence.seat is not None
            assert 0 <= portion.start < portion.stop <= limits.max_model_len
            assert len(sequence.page_ids) == -(-portion.stop // PAGE)
            if sequence.request.params.needs_seat_features:
                assert self.loaded[sequence.seat] is sequence

    def _copy(self, plan: StepPlan) -> None:
        """All pages are read before any is written, as one gather and one scatter do."""
        targets = [target for _, target in plan.copies]
        assert len(set(targets)) == len(targets), "two copies into one page"
        self.num_copies += len(targets)
        old = {
            (target, offset): self.slots.get(source * PAGE + offset)
            for source, target in plan.copies
            for offset in range(PAGE)
        }
        for (page, offset), value in old.items():
            self.slots.pop(page * PAGE + offset, None)
            if value is not None:
                self.slots[page * PAGE + offset] = value

    def _write(self, plan: StepPlan) -> None:
        written: set[int] = set()
        self.before = dict(self.slots)
        for portion in plan.portions:
            sequence, known = portion.sequence, len(portion.sequence.tokens)
            assert portion.stop <= known + 1
            tokens = truth(sequence, portion.stop)
            if portion.stop > known:
                assert sequence.seat is not None
                assert self.last_tokens[sequence.seat] == tokens[-1], "another one's last token"
            for index in range(portion.start, portion.stop):
                slot = sequence.page_ids[index // PAGE] * PAGE + index % PAGE
                assert slot not in written, "a slot is written twice in one step"
                written.add(slot)
                self._check_sharing(sequence, slot)
                self.slots[slot] = content(sequence.request, tokens[: index + 1])
            self.num_computed += portion.stop - portion.start
        self.written = written

    def _check_sharing(self, sequence: Sequence, slot: int) -> None:
        """A shared page has one writer, and what others rely on is never written again."""
        page = slot // PAGE
        if self.pool.ref_count(page) > 1:
            writer = self.writers.get(page, sequence)
            assert writer is sequence or page not in writer.page_ids, "two writers on one page"
            assert self.claims.get(slot, set()) <= {sequence}, "shared KV is modified"
        self.writers[page] = sequence

    def allocate(self, count: int) -> list[int]:
        """Stands before the pool's own: a page that is handed out has no history."""
        pages = PagePool.allocate(self.pool, count)
        for page in pages:
            self.writers.pop(page, None)
            for offset in range(PAGE):
                self.claims.pop(page * PAGE + offset, None)
        return pages

    def _read(self, plan: StepPlan) -> None:
        """Each query sees slots written before this step, or by its own portion."""
        for portion in plan.portions:
            tokens = truth(portion.sequence, portion.stop)
            for index in range(portion.stop):
                slot = portion.sequence.page_ids[index // PAGE] * PAGE + index % PAGE
                slots = self.slots if index >= portion.start else self.before
                expected = content(portion.sequence.request, tokens[: index + 1])
                assert slots.get(slot) == expected, (index, slots.get(slot), expected)

    def _sample(self, plan: StepPlan) -> tuple[SampleOutput, Any]:
        at, owners = 0, []
        for portion in plan.portions:
            owners += [owner for _, owner in _rows(portion, at)]
            at += portion.stop - portion.start
        drawn = []
        for owner in owners:
            sequence = owner.sequence
            tokens = truth(sequence, owner.position + 1)
            drawn.append(tokens[owner.position])
            if owner.draws:
                self.last_tokens[sequence.seat] = tokens[owner.position]
        rows = len(owners)
        arrays: dict[str, Any] = {
            "tokens": np.asarray(drawn, np.int32),
            "healthy": np.ones(rows, bool),
            "logprobs": np.asarray([-float(o.position) for o in owners], np.float32),
            "ranks": np.ones(rows, np.int32),
            "top_ids": np.full((rows, 20), -1, np.int32),
            "top_logprobs": np.zeros((rows, 20), np.float32),
        }
        return SampleOutput(**arrays), tuple(owners)

    def _error(self, plan: StepPlan) -> Exception | None:
        poisoned = [c.sequence for c in plan.portions if is_poison(c.sequence, c.stop)]
        if poisoned:
            self.mode = "read"
            return jax.errors.JaxRuntimeError("INTERNAL: poisoned")
        if self.fail_next is None:
            return None
        self.mode, self.fail_next = self.fail_next, None
        involved = {c.sequence for c in plan.portions}
        if len(involved) == 1:  # whoever is alone with it may be blamed for it
            self.blamed |= {s.request for s in involved}
        return jax.errors.JaxRuntimeError("INTERNAL: transient")


def is_poison(sequence: Sequence, stop: int) -> bool:
    """Whether a step that takes `sequence` to `stop` must raise: its second output token."""
    args = sequence.request.params.extra_args or {}
    return bool(args.get("poison")) and stop >= sequence.num_prompt + 1


def make_engine(
    num_pages: int,
    *,
    max_num_seqs: int = 3,
    max_num_batched_tokens: int = 8,
    max_model_len: int = 40,
    max_scored_tokens: int = 4,
    overlap: bool = True,
    prefix_caching: bool = True,
) -> tuple[Engine, FakeRunner, Intake]:
    config: Any = types.SimpleNamespace(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=prefix_caching,
        eviction_policy="lru",
        overlap=overlap,
        deterministic=False,
        chunk_cache_share=0.5,
        chunk_eviction_policy="lru",
        reuse=None,
    )
    model: Any = types.SimpleNamespace(config=types.SimpleNamespace(num_layers=1, hidden_size=1))
    spec: Any = types.SimpleNamespace(page_size=PAGE, bytes=lambda tokens: tokens, groups=())
    ticks: Iterator[int] = iter(range(10**9))
    with (
        mock.patch.object(engine_module, "Runner", FakeRunner),
        mock.patch.object(engine_module, "model_tag", return_value="no weights"),
        mock.patch.object(engine_module, "MAX_SCORED_TOKENS", max_scored_tokens),
    ):
        engine = Engine(
            model,
            spec,
            num_pages,
            config,
            max_model_len,
            clock=lambda: float(next(ticks)),
        )
    intake = Intake(
        LetterTokenizer(),
        vocab_size=NUM_LETTERS,
        end_token_ids=(END,),
        max_model_len=max_model_len,
        max_prompt_tokens=num_pages * PAGE,
        seed=0,
        clock=lambda: float(next(ticks)),
    )
    runner: Any = engine.runner
    runner.pool = engine.scheduler.pool
    runner.pool.allocate = runner.allocate
    return engine, runner, intake


def audit(engine: Engine, runner: FakeRunner, parked: list[Sequence]) -> None:
    """Everything that host bookkeeping calls computed is on the device, and is what it should be.

    Reads the state after all dispatched steps, which the fake device runs at once.
    """
    engine.check_integrity()
    if runner.lost:
        return
    scheduler = engine.scheduler
    runner.claims = claims = {}
    for sequence in (*scheduler.running, *scheduler.waiting, *parked):
        tokens = truth(sequence, sequence.num_computed)
        assert sequence.num_computed <= len(sequence.page_ids) * PAGE
        for index in range(sequence.num_computed):
            slot = sequence.page_ids[index // PAGE] * PAGE + index % PAGE
            assert runner.slots.get(slot) == content(sequence.request, tokens[: index + 1])
            claims.setdefault(slot, set()).add(sequence)
    tree = scheduler.tree
    for node in () if tree is None else tree.nodes():
        tokens, above = [], node
        while above is not None:
            tokens = [*above.tokens.tolist(), *tokens]
            above = above.parent
        for index in range(node.start, node.end):
            slot = node.pages[index // PAGE - node.start // PAGE] * PAGE + index % PAGE
            expected = (node.namespace, index + 1, tuple(tokens[: index + 1]))
            assert runner.slots.get(slot) == expected
            claims.setdefault(slot, set()).add("tree")
