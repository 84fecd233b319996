"""The loop: plan, run, commit. The only owner of the device's KV.

    step n    |  device computes n        |  device computes n + 1   |
    host      |  plan n+1, dispatch n+1, then wait for n and commit n |

The host plans a step before it has read the one before: a token that is still on the device is fed
from there. What a sequence must stop at is therefore seen one step late; the extra token is
discarded, and its slot never enters the prefix tree.
"""

import collections
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from kvjax.cache.chunks import CHUNK_EVICTION_POLICIES as CHUNK_POLICIES
from kvjax.cache.chunks import ChunkStore
from kvjax.cache.pages import KVSpec
from kvjax.cache.pool import PagePool
from kvjax.cache.radix import EVICTION_POLICIES, RadixTree
from kvjax.chunks import Chunks
from kvjax.config import EngineConfig, one_of
from kvjax.errors import GrammarFailed, KVJaxError, StepFailed
from kvjax.facts import model_facts
from kvjax.logprobs import position_logprobs, read_report
from kvjax.models import Transformer
from kvjax.models.tag import model_tag
from kvjax.observing import Device
from kvjax.pallas_kernels import cascade_refusal
from kvjax.readout import LayerKV
from kvjax.recovery import Suspects, first_line
from kvjax.request import FinishReason, PositionLogprobs
from kvjax.reuse import parse
from kvjax.reuse.pack import stage_rows
from kvjax.reuse.repair import repair_after
from kvjax.reuse.report import Fate, staged_report
from kvjax.reuse.restore import hidden_dtype
from kvjax.reuse.warming import reuse_programs
from kvjax.runner import Dispatched, Runner
from kvjax.schedule import Scheduler
from kvjax.sequence import Assembled, Request, Sequence, Status
from kvjax.shrink import out_of_memory, smaller
from kvjax.step_plan import Limits, Portion, StepPlan
from kvjax.transfer import Spans

log = logging.getLogger("kvjax")
_ASKED = "the structured outputs, bad words and allowed token ids together"
MAX_SCORED_TOKENS = 128  # prompt tokens whose logits one step keeps


class Engine:
    """Continuous batching over one model. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        model: Transformer,
        spec: KVSpec,
        num_pages: int,
        config: EngineConfig,
        max_model_len: int,
        clock: Callable[[], float] = time.monotonic,
        decode_token: Callable[[int], str] | None = None,
        cascade: bool | None = None,
    ) -> None:
        """`cascade=None`: where the platform gains by it and nobody asked for steady bits."""
        self.config, self.spec, self.clock = config, spec, clock
        # The last token's KV is never needed: a sequence may be one longer than the pool.
        max_model_len = min(max_model_len, num_pages * spec.page_size + 1)
        self.limits = Limits(
            config.max_num_seqs,
            config.max_num_batched_tokens,
            max_model_len,
            min(MAX_SCORED_TOKENS, config.max_num_batched_tokens),
        )
        pool = PagePool(num_pages, spec.page_size)
        tree = None
        if config.enable_prefix_caching:
            policy = one_of("eviction_policy", config.eviction_policy, EVICTION_POLICIES)
            tree = RadixTree(pool, policy())
        leaving = one_of("chunk_eviction_policy", config.chunk_eviction_policy, CHUNK_POLICIES)
        store = ChunkStore(pool, int(config.chunk_cache_share * num_pages), leaving)
        self.scheduler = Scheduler(pool, tree, self.limits, clock, store, self._assemble)
        if cascade is None:
            never = cascade_refusal(jax.default_backend())
            cascade = never is None and not config.deterministic
        self.runner = Runner(model, spec, num_pages, self.limits, cascade)
        facts = model_facts(model.config, spec, model_tag(model))
        self.runner.side_keys = reuse_programs(parse(config.reuse), facts, max_model_len)
        self.chunks = Chunks(
            store, facts, self.scheduler, self.discard, max_model_len,
            Device(lambda slots, shift: self.runner.read(slots, shift),
                   lambda shape, arguments: self.runner.beside(shape, *arguments),
                   spec.page_size, -(-max_model_len // spec.page_size)),
            self._hidden,
        )  # fmt: skip
        self._decode_token = decode_token
        # Gives parked pages back that nobody must have, when a request cannot run otherwise.
        self.reclaim: Callable[[], bool] | None = None
        self._in_flight: Dispatched | None = None
        self._parked: set[Sequence] = set()
        self._abandoned: collections.deque[Sequence] = collections.deque()
        self._ended: set[Sequence] = set()  # over, but the step in flight still computes for them
        self._suspects = Suspects()
        self.num_shrinks = 0  # how often the device's memory was too small for a step
        self._failed: list[Request] = []
        self._refused: list[tuple[Request, KVJaxError]] = []  # by their strategy, while planning

    # ---- requests ---------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queues a request: its first branch now, the others once the prompt is computed."""
        self._parked.discard(request.sequences[0])
        if not self.chunks.hold_back(request):
            self.scheduler.add(request.sequences[0])

    def _assemble(self, sequence: Sequence, exact: int) -> Assembled | None:
        try:
            assembly = self.chunks.assemble(sequence, exact)
            if assembly is not None:
                self.chunks.store.hold(sequence, (move.variant for move in assembly.moves))
            return assembly
        except (KVJaxError, ValueError) as error:  # of the strategy; others must not suffer
            failure = error if isinstance(error, KVJaxError) else KVJaxError(str(error))
            self._refused.append((sequence.request, failure))
            return None

    def abort(self, request: Request, reason: FinishReason = "abort") -> None:
        """Ends what is left of a request now. Its pages are free for the next step."""
        for sequence in request.sequences:
            if sequence.status is not Status.FINISHED:
                self._finish(sequence, reason)

    def discard(self, sequence: Sequence) -> None:
        """Gives up the pages of a parked sequence."""
        self._parked.discard(sequence)
        self.scheduler.release(sequence)

    def abandon(self, sequence: Sequence) -> None:
        """`discard` for the garbage collector, which may run anywhere: done when pages count."""
        self._abandoned.append(sequence)

    def _discard_abandoned(self) -> None:
        while self._abandoned:
            self.discard(self._abandoned.popleft())

    def park(self, sequence: Sequence, parent: Sequence) -> None:
        """Makes `sequence` a parked fork of the parked `parent`: they share its pages."""
        self.scheduler.fork(parent, sequence)
        sequence.status = Status.FINISHED
        self._parked.add(sequence)

    def score(self, sequence: Sequence, continuation: list[int]) -> np.ndarray:
        """Logits f32[1 + len(continuation), vocab] behind a parked sequence's last token and behind
        each token of `continuation`. Runs these over the sequence's KV, which stays as it is.

        Raises:
          OutOfPages: there is no room for the KV of the continuation.
        """
        size, first = self.spec.page_size, len(sequence.tokens) - 1
        kept = first // size
        with self.scheduler.lease(-(-(first + 1 + len(continuation)) // size) - kept) as lease:
            copy = (sequence.page_ids[kept], lease.pages[0]) if first % size else None
            pages = [*sequence.page_ids[:kept], *lease.pages]
            with self._consuming_pages():
                return self.runner.score([sequence.tokens[-1], *continuation], first, pages, copy)

    def entering(self, sequence: Sequence, start: int, stop: int, layer: int) -> np.ndarray:
        """What enters `layer` at tokens `[start, stop)` of a parked sequence: f32[tokens, hidden].

        Runs the layers below it over the sequence's KV, which stays as it is.
        """
        tokens = sequence.tokens[start:stop]
        with self._consuming_pages():
            return self.runner.hidden(tokens, start, sequence.page_ids, (layer,), "float32")[0]

    def _hidden(self, tokens: list[int], first: int, page_ids: list[int]) -> np.ndarray:
        """What enters every layer, as it is kept."""
        layers, dtype = tuple(range(self.runner.config.num_layers)), hidden_dtype(self.spec)
        with self._consuming_pages():
            return self.runner.hidden(tokens, first, page_ids, layers, dtype)

    def read(self, sequence: Sequence) -> tuple[LayerKV, ...]:
        """KV of a parked sequence's tokens, by layer: as stored, in float32."""
        size, at = self.spec.page_size, np.arange(sequence.num_computed)
        slots = np.asarray(sequence.page_ids)[at // size] * size + at % size
        k, v = self.runner.read(slots, 0)
        values = [None] * len(k) if v is None else v
        return tuple(LayerKV(keys, held) for keys, held in zip(k, values, strict=True))

    def load(self, spans: Spans, slots: np.ndarray) -> None:
        """Stores KV that `Runner.export` gave at slots that nobody else reads or writes."""
        with self._consuming_pages():
            self.runner.load(spans, slots)

    @contextlib.contextmanager
    def _consuming_pages(self) -> Iterator[None]:
        """Around a program that takes the pages and gives them back: a failure loses them."""
        try:
            yield
        except BaseException:
            self._start_over()
            raise

    @property
    def parked(self) -> frozenset[Sequence]:
        """Sequences that are over and keep their pages."""
        return frozenset(self._parked)

    @property
    def has_work(self) -> bool:
        """Whether `step()` has anything left to do."""
        waiting = bool(self._failed) or self.chunks.busy
        return self.scheduler.has_work or self._in_flight is not None or waiting

    # ---- the loop ---------------------------------------------------------------------------

    def step(self) -> list[Request]:
        """Plans and dispatches a step, commits the one before; the requests that made progress."""
        self._discard_abandoned()
        for request in self.chunks.settle():
            self.scheduler.add(request.sequences[0])
        touched = {id(r): r for r in self._take_failed()}
        previous, self._in_flight = self._in_flight, None
        dispatching: StepPlan | None = None
        try:
            if previous is not None and not self._may_overlap():
                touched |= self._commit(previous)
                previous = None
            self.scheduler.only = self._suspects.under_test
            plan = self.scheduler.plan()
            if plan.sequences:
                dispatching = plan
                self._in_flight = self.runner.dispatch(plan)
                dispatching = None
            if previous is not None:
                touched |= self._commit(previous)
            elif not plan.sequences:
                self._explain_standstill()
        except jax.errors.JaxRuntimeError as error:
            steps = [s.plan for s in (previous, self._in_flight) if s is not None]
            self._recover(steps, dispatching, error)
        except BaseException:  # an interrupt, or a bug: what was planned may not have been computed
            self._start_over()
            raise
        self._fail_refused()
        touched |= {id(r): r for r in self._take_failed()}
        return list(touched.values())

    def _may_overlap(self) -> bool:
        """Whether the next step can be planned before this one's tokens are known.

        A grammar's next mask needs the last token.
        """
        grammars = any(sequence.grammar is not None for sequence in self.scheduler.running)
        return self.config.overlap and self._suspects.none and not grammars

    def _commit(self, step: Dispatched) -> dict[int, Request]:
        """Reads a step's results and appends them. Blocks until the device is done with it."""
        if step.out is None:
            return self._commit_staged(step)
        tokens = np.asarray(step.out.tokens)
        healthy = np.asarray(step.out.healthy)
        report = read_report(step.out, step.owners)
        now = self.clock()
        touched = {}
        ended, self._ended = self._ended, set()
        for portion in step.plan.portions:
            if portion.ends_prompt and portion.sequence.assembly is not None:
                self._observe(portion.sequence, step, healthy)
        for row, owner in enumerate(step.owners):
            sequence = owner.sequence
            if sequence.status is Status.FINISHED or sequence in ended:
                continue  # it ended one step before; this token is discarded
            request = sequence.request
            touched[id(request)] = request
            entry = None
            if report is not None:
                entry = position_logprobs(report, row, owner, self._decode_token)
            if not owner.draws:
                assert request.prompt_logprobs is not None
                request.prompt_logprobs[owner.position] = entry
                continue
            sequence.num_pending -= 1
            if not healthy[row]:
                self._fail(request, StepFailed("the model gave no finite logits"))
                continue
            self._append(sequence, int(tokens[row]), entry, now)
        for portion in step.plan.portions:
            sequence = portion.sequence
            if not sequence.request.samples and portion.stop >= len(sequence.tokens):
                touched[id(sequence.request)] = sequence.request
                if sequence.status is Status.RUNNING:
                    self._finish(sequence, "length")
        self._suspects.passed(step.plan.portions)
        return touched

    def _observe(self, sequence: Sequence, step: Dispatched, healthy: np.ndarray) -> None:
        """Shows a prompt that this step has computed to its strategy, unless it came out sick."""
        drawn = (row for row, o in enumerate(step.owners) if o.draws and o.sequence is sequence)
        if all(healthy[row] for row in drawn):
            self.chunks.observe(sequence)

    def _commit_staged(self, step: Dispatched) -> dict[int, Request]:
        """Notes which rows a staged prefill chose. Blocks until the device is done with it."""
        sequence = step.plan.staged
        assert sequence is not None
        ended, self._ended = self._ended, set()
        if sequence.assembly is None or sequence in ended:
            return {}
        if step.plan.repairs:
            return self._commit_repair(sequence, np.asarray(step.stages[-1]))
        stages = stage_rows(sequence.assembly.staged.stages, step.stages)
        report = staged_report(sequence.request.report, stages)
        if step.kept and sequence.assembly.repair:
            sequence.repair = repair_after(sequence.assembly, report, np.asarray(step.kept[-1]))
        sequence.request.report = report
        sequence.request.num_cached_tokens = int((report.fates[-1] < Fate.RECOMPUTED).sum())
        self._suspects.passed([Portion(sequence, 0, 1, False, False)])
        return {}

    def _commit_repair(self, sequence: Sequence, rows: np.ndarray) -> dict[int, Request]:
        rows = rows[rows >= 0]
        report = sequence.request.report
        if sequence.repair is not None:
            sequence.repair.ran(rows)
        if report is not None:
            count = report.repaired_tokens + len(rows)
            sequence.request.report = dataclasses.replace(report, repaired_tokens=count)
        return {}

    def _append(
        self, sequence: Sequence, token: int, entry: PositionLogprobs | None, now: float
    ) -> None:
        """Takes a drawn token and ends the sequence where it must end."""
        request, params = sequence.request, sequence.request.params
        if sequence.grammar is not None and not sequence.grammar.accept(token):
            self._fail(request, GrammarFailed(f"no token that {_ASKED} allow has a chance"))
            return
        sequence.tokens.append(token)
        request.metrics.num_output_tokens += 1
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = now
        if entry is not None and sequence.logprobs is not None:
            sequence.logprobs.append(entry)
            sequence.cumulative_logprob += entry[token].logprob
        is_end = token in sequence.end_token_ids
        is_stop = token in (params.stop_token_ids or ())
        full = (params.max_tokens is not None and sequence.num_output >= params.max_tokens) or len(
            sequence.tokens
        ) >= self.limits.max_model_len
        complete = sequence.grammar is not None and sequence.grammar.complete
        over = is_end or is_stop or full or complete
        stop = sequence.text.push(token, over) if sequence.text is not None else None
        if stop is not None:
            sequence.stop_reason = stop
            self._finish(sequence, "stop")
        elif is_end or is_stop or complete:
            sequence.stop_reason = token if is_stop else None
            self._finish(sequence, "stop")
        elif full:
            self._finish(sequence, "length")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        sequence.repair = None
        self.scheduler.finish(sequence)
        self.chunks.store.let_go(sequence)
        if self._in_flight is not None:
            self._ended.add(sequence)  # it may be run again before that step is committed
        if sequence.keeps_pages:
            self._parked.add(sequence)
        self._suspects.drop(sequence)
        if sequence.request.finished:
            sequence.request.metrics.finished_time = self.clock()

    # ---- failures ---------------------------------------------------------------------------

    def _explain_standstill(self) -> None:
        """Nothing runs, nothing is on its way: the first in the queue can never be served."""
        stuck = self.scheduler.stuck()
        if stuck is not None and not (self.reclaim is not None and self.reclaim()):
            sequence, why = stuck
            self._fail(sequence.request, why)

    def _fail(self, request: Request, error: KVJaxError) -> None:
        request.error = error
        self.abort(request, "error")
        self._failed.append(request)

    def _fail_refused(self) -> None:
        """Ends the requests that their strategies refused while the step was planned."""
        refused, self._refused = self._refused, []
        for request, error in refused:
            if not request.finished:
                self._fail(request, error)

    def _take_failed(self) -> list[Request]:
        failed, self._failed = self._failed, []
        return failed

    def _recover(
        self, plans: list[StepPlan], dispatching: StepPlan | None, error: Exception
    ) -> None:
        """The device lost pages and state: starts everyone over, and finds the culprit.

        The steps that were in flight are run again in halves until one sequence is left to blame;
        the others never notice. Nobody is to blame where the device ran out of memory and a step
        can be smaller.
        """
        if out_of_memory(error) and self._shrink(dispatching or plans[0]):
            return
        plans = [*plans, dispatching] if dispatching else plans
        sequences = {sequence for plan in plans for sequence in plan.sequences}
        alive = {s for s in sequences if s.status is not Status.FINISHED and s not in self._ended}
        self._start_over()
        culprit = self._suspects.failed(alive, others=len(alive) < len(sequences))
        if culprit is not None:
            blame = StepFailed(f"the device step failed: {first_line(error)}")
            blame.__cause__ = error
            self._fail(culprit.request, blame)

    def _shrink(self, failed: StepPlan) -> bool:
        """Starts everyone over with smaller steps; False if there are none. They stay so."""
        limits = smaller(self.scheduler.limits, self.runner.buckets, failed)
        if limits is None:
            return False
        self._start_over()
        self.scheduler.resize(limits)
        self.num_shrinks += 1
        log.warning(
            "the device ran out of memory in a step of %d tokens of %d sequences: from now on at "
            "most %d tokens of %d sequences a step; %d sequences start over",
            failed.num_tokens, len(failed.portions), limits.max_num_batched_tokens,
            limits.max_num_seqs, len(self.scheduler.waiting),
        )  # fmt: skip
        return True

    def _start_over(self) -> None:
        """Pages and decode state anew; every sequence computes its KV again from its tokens."""
        self._in_flight = None
        self._ended.clear()
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            sequence.num_pending = 0
        self.scheduler.forget()
        for sequence in self._parked:
            self.scheduler.release(sequence)
        self.runner.rebuild()

    # ---- beside the loop --------------------------------------------------------------------

    def reset_prefix_cache(self) -> int:
        """Forgets every cached prefix; the number of pages freed. Who uses one keeps its pages."""
        self._discard_abandoned()
        tree = self.scheduler.tree
        return 0 if tree is None else tree.reset()

    def check_integrity(self) -> None:
        """Asserts that host bookkeeping is consistent, and that nothing leaked when idle."""
        self._discard_abandoned()
        self.scheduler.check_integrity()
        if not self.has_work:
            tree, pool = self.scheduler.tree, self.scheduler.pool
            held = {page for sequence in self._parked for page in sequence.page_ids}
            cached = 0 if tree is None else tree.num_pages
            stored = {page for variant in self.chunks.store for page in variant.page_ids}
            used = pool.num_pages - pool.num_free
            most = cached + len(held | stored)
            assert max(cached, len(held | stored)) <= used <= most, (cached, held, stored, used)
