"""Which tokens the next step computes: continuous batching over pages, prefix tree and seats.

Pure policy on host integers. `plan()` takes pages and seats and hands out a `StepPlan`; it never
touches the device and never changes a token. A page has one writer: the sequence that allocated it.
Others that share it (a fork, a prefix hit) copy it before their first write.
"""

from collections.abc import Callable, Hashable

from kvjax.cache.chunks import ChunkStore
from kvjax.cache.pool import PageLease, PagePool
from kvjax.cache.radix import Match, RadixTree
from kvjax.errors import OutOfPages
from kvjax.sequence import Assembled, Sequence, Status
from kvjax.step_plan import Draft, Limits, Portion, StepPlan


class Scheduler:
    """Owns the queues, the seats and the page accounting of one engine."""

    def __init__(
        self,
        pool: PagePool,
        tree: RadixTree | None,
        limits: Limits,
        clock: Callable[[], float],
        chunks: ChunkStore | None = None,
        assemble: Callable[[Sequence, int], Assembled | None] | None = None,
    ) -> None:
        """`assemble(sequence, exact)` says how stored chunks serve a prompt whose first `exact`
        tokens were found in the tree."""
        self.pool, self.tree, self.clock = pool, tree, clock
        self.chunks, self.assemble = chunks, assemble
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.only: frozenset[Sequence] | None = None  # while a failure is being narrowed down
        self.num_preemptions = 0
        self._held_up: Sequence | None = None  # the first in the queue that found no room
        self._staged_due = False  # the first in the queue wants a step for itself
        self.resize(limits)

    def resize(self, limits: Limits) -> None:
        """Takes other limits while nobody has a seat."""
        self.limits, self._seats = limits, list(range(limits.max_num_seqs - 1, -1, -1))

    # ---- queues -----------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence by priority, then arrival. It may bring pages (fork, parked)."""
        self._rewind(sequence)
        sequence.status = Status.WAITING
        at = len(self.waiting)
        while at and self.waiting[at - 1].order > sequence.order:
            at -= 1
        self.waiting.insert(at, sequence)

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence off: its KV enters the tree, its pages go back or are parked."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        self._free_seat(sequence)
        sequence.status = Status.FINISHED
        sequence.num_pending = 0
        # The last token's KV may be computed by a step in flight; only what is kept counts.
        sequence.num_computed = min(sequence.num_computed, len(sequence.tokens))
        self._remember(sequence)
        if not sequence.keeps_pages:
            self.release(sequence)
        else:
            self._trim(sequence)

    def release(self, sequence: Sequence) -> None:
        """Gives up a sequence's pages; its tokens stay."""
        self.pool.release(sequence.page_ids)
        sequence.page_ids = []
        sequence.num_computed = 0
        sequence.owns_tail = True
        sequence.assembly, sequence.reused, sequence.repair = None, (), None

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Lets `child`, whose tokens start with `parent`'s, share what `parent` has computed.

        No device work and no copy: the child copies a shared partial page when it first writes.
        """
        computed = min(parent.num_computed, len(child.tokens))
        count = -(-computed // self.pool.page_size)
        child.page_ids = list(parent.page_ids[:count])
        self.pool.retain(child.page_ids)
        child.num_computed = computed
        child.owns_tail = False
        child.assembly = parent.assembly

    def lease(self, count: int) -> PageLease:
        """Pages for a while, in place of what is only cached if need be. Entering it may raise
        `OutOfPages`."""
        self._free(count)
        return self.pool.lease(count)

    def forget(self) -> None:
        """The device lost every page: all sequences start over, the tree is empty."""
        for sequence in list(self.running):
            self._to_waiting(sequence)
        for sequence in self.waiting:
            self.release(sequence)
        if self.tree is not None:
            self.tree.clear()
        if self.chunks is not None:
            self.chunks.lose_pages()

    @property
    def has_work(self) -> bool:
        """Whether any sequence is waiting or running."""
        return bool(self.waiting or self.running)

    # ---- planning ---------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """The next step; empty if nothing can run now (results are due, or no pages are free)."""
        if (repair := self._repair()) is not None:
            return repair
        self._step_aside()
        step = Draft(self.limits.max_num_batched_tokens)
        staged_first, self._staged_due = self._staged_due, False
        if staged_first:
            self._admit(step)
        if step.staged is None:
            for sequence in sorted(self.running, key=lambda s: s.order):
                if sequence.status is Status.RUNNING and sequence not in step.starts:
                    self._continue(sequence, step)
            if not staged_first:
                self._admit(step)
        # Only now: a hit in the same step would copy a partial page before it is written.
        for portion in step.portions:
            if portion.start < portion.sequence.num_prompt:
                self._remember(portion.sequence)
                self._fork_branches(portion)
        self.pool.release(step.held)
        return StepPlan(
            tuple(step.portions), tuple(step.copies), tuple(step.loads), tuple(step.moves),
            step.staged,
        )  # fmt: skip

    def _repair(self) -> StepPlan | None:
        """A step that runs reused rows of one sequence again, if it has decoded since its last.
        None while a culprit is looked for."""
        for sequence in self.running if self.only is None else ():
            repair, size = sequence.repair, self.pool.page_size
            if repair is None or not repair.due(sequence.num_computed, sequence.num_prompt):
                continue
            if repair.plan(sequence.num_computed, sequence.page_ids, size, self.pool.ref_count):
                return StepPlan((), (), (), staged=sequence, repairs=True)
        return None

    def _step_aside(self) -> None:
        """Takes seats from those who must not run now, or from one less urgent than who waits."""
        if self.only is not None:
            for sequence in [s for s in self.running if s not in self.only]:
                self._remember(sequence)
                self._to_waiting(sequence)
            return
        held_up, self._held_up = self._held_up, None
        if held_up is not None and held_up.status is Status.WAITING and self.running:
            last = max(self.running, key=lambda s: s.order)
            if last.request.params.priority > held_up.request.params.priority:
                self.preempt(last)

    def _fork_branches(self, portion: Portion) -> None:
        """Queues the other branches of a request (n > 1) once the first has computed the prompt."""
        first = portion.sequence
        if first.is_first and portion.stop >= first.num_prompt:
            for child in first.request.sequences[1:]:
                if child.status is Status.DORMANT:
                    self.fork(first, child)
                    self.add(child)

    def _allowed(self, sequence: Sequence) -> bool:
        return self.only is None or sequence in self.only

    def _continue(self, sequence: Sequence, step: Draft) -> None:
        """Plans the next tokens of a running sequence, preempting others for pages if need be."""
        todo = self._todo(sequence, step)
        if todo == 0:
            return
        while not self._make_room(sequence, todo, step):
            victim = max((s for s in self.running if s not in step.starts), key=lambda s: s.order)
            if victim is sequence and self._reclaim_waiting(sequence):
                continue
            self.preempt(victim)
            if victim is sequence:
                return
        self._take(sequence, todo, step)

    def _todo(self, sequence: Sequence, step: Draft) -> int:
        """Tokens of `sequence` that this step can compute: what is known, or one on the device."""
        known = len(sequence.tokens) - sequence.num_computed - sequence.reused_ahead
        if known <= 0:
            due = sequence.num_output + sequence.num_pending
            length = len(sequence.tokens) + sequence.num_pending
            limit = sequence.request.params.max_tokens
            if (limit is not None and due >= limit) or length >= self.limits.max_model_len:
                return 0  # the last token is on its way
            known = 1 if sequence.num_pending and sequence.request.samples else 0
        if not sequence.scores_prompt:
            return min(known, step.budget)
        # A step that scores a prompt has a program of its own, with a logits row for every token.
        room = self.limits.max_scored_tokens - step.num_tokens
        return max(0, min(known, step.budget, room))

    def _admit(self, step: Draft) -> None:
        """Starts waiting sequences in order, while seats, budget and pages last."""
        for sequence in list(self.waiting):
            if not self._allowed(sequence) or sequence.num_pending:
                continue
            if not step.budget:
                self._held_up = sequence
            if not step.budget or step.deferred > 4 * self.limits.max_num_seqs:
                return
            if self._shares_with_prefill(sequence, step):
                step.deferred += 1  # that prefill computes its prefix; soon it is a hit
                continue
            todo = self._seat_and_room(sequence, step)
            if not todo:
                self._held_up = sequence
                return  # a smaller one behind must not overtake for ever
            self._start(sequence, step)
            if sequence.assembly is not None and sequence.assembly.staged is not None:
                step.staged = sequence
                return
            self._take(sequence, todo, step)

    def _seat_and_room(self, sequence: Sequence, step: Draft) -> int:
        """Tokens of a waiting sequence that this step can compute, and pages for them; or 0."""
        if not self._seats:
            return 0
        matched = not sequence.page_ids and self._match(sequence)
        staged = sequence.assembly is not None and sequence.assembly.staged is not None
        if matched and staged and step.starts:
            self.release(sequence)
            self._staged_due = True
            return 0
        todo = self._first_room(sequence, step)
        if not todo and not self.running and self._reclaim_waiting(sequence):
            todo = self._first_room(sequence, step)
        if not todo and (matched or not self.running):
            self.release(sequence)
            if not self.running:  # the pages that it shares may be what is in its way
                todo = self._first_room(sequence, step)
        return todo

    def _first_room(self, sequence: Sequence, step: Draft) -> int:
        """Gets pages for the first tokens, provided that all that are known would fit."""
        whole = len(sequence.tokens) - sequence.num_computed
        if sequence.reused or (sequence.assembly is not None and sequence.assembly.moves):
            # What is moved needs its pages at once.
            if not self._make_room(sequence, whole, step):
                return 0
            self._skip_reused(sequence)
            return self._todo(sequence, step)
        todo = self._todo(sequence, step)
        return todo if todo and self._make_room(sequence, whole, step, take=todo) else 0

    def _start(self, sequence: Sequence, step: Draft) -> None:
        """Moves a waiting sequence to a seat."""
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.status = Status.RUNNING
        sequence.seat = self._seats.pop()
        request = sequence.request
        if request.metrics.first_scheduled_time is None:
            request.metrics.first_scheduled_time = self.clock()
            request.num_cached_tokens = sequence.num_computed + sequence.reused_ahead
        if request.params.needs_seat_features:
            step.loads.append(sequence)
        if sequence.assembly is not None:
            request.report = sequence.assembly.report
            for move in sequence.assembly.moves:
                step.moves.append((sequence, move))
                self.pool.retain(move.variant.page_ids)  # nobody else gets them within this step
                step.held += move.variant.page_ids

    def _take(self, sequence: Sequence, todo: int, step: Draft) -> None:
        """Commits to computing `todo` tokens. Pages are there already."""
        start = stop = sequence.num_computed
        skipped, left = [], todo
        for a, b in (*sequence.reused, (len(sequence.tokens) + 1, 0)):
            if a < stop:
                continue
            taken = min(left, a - stop)
            stop, left = stop + taken, left - taken
            if not left:
                break
            skipped.append((a, b))
            stop = b
        last = stop >= len(sequence.tokens)
        scores = sequence.scores_prompt
        samples = last and sequence.request.samples
        step.portions.append(Portion(sequence, start, stop, samples, scores, tuple(skipped)))
        step.starts[sequence] = start
        step.num_tokens += todo
        step.budget -= todo
        if scores:
            step.budget = min(step.budget, self.limits.max_scored_tokens - step.num_tokens)
        sequence.num_computed = stop
        self._skip_reused(sequence)
        if samples:
            sequence.num_pending += 1

    def _skip_reused(self, sequence: Sequence) -> None:
        """Goes on to the first token whose KV is neither there nor planned."""
        for a, b in sequence.reused:
            if a <= sequence.num_computed < b:
                sequence.num_computed = b

    # ---- pages ------------------------------------------------------------------------------

    def _make_room(
        self, sequence: Sequence, needed: int, step: Draft, take: int | None = None
    ) -> bool:
        """Gets pages for the next `take` tokens if those for all `needed` could be had."""
        size, have = self.pool.page_size, len(sequence.page_ids)
        copies = self._must_copy(sequence)

        def pages(tokens: int) -> int:
            return max(0, -(-(sequence.num_computed + tokens) // size) - have) + copies

        if not self._free(pages(needed)):
            return False
        fresh = self.pool.allocate(pages(needed if take is None else take))
        if copies:
            shared, own = sequence.page_ids[-1], fresh.pop(0)
            step.copies.append((shared, own))
            sequence.page_ids[-1] = own
            self.pool.release([shared])
        sequence.owns_tail = True
        sequence.page_ids += fresh
        return True

    def _must_copy(self, sequence: Sequence) -> int:
        """1 if the next token lands in a page that somebody else also uses or writes."""
        if sequence.owns_tail or sequence.num_computed % self.pool.page_size == 0:
            return 0
        assert len(sequence.page_ids) == sequence.num_computed // self.pool.page_size + 1
        return int(self.pool.ref_count(sequence.page_ids[-1]) > 1)

    def _free(self, count: int) -> bool:
        missing = count - self.pool.num_free
        if missing > 0 and self.tree is not None:
            self.tree.evict(missing)
        while (missing := count - self.pool.num_free) > 0 and self.chunks is not None:
            if not self.chunks.evict(missing):
                break
            if self.tree is not None:  # whose prefixes may share the chunks' pages
                self.tree.evict(count - self.pool.num_free)
        return count <= self.pool.num_free

    def _match(self, sequence: Sequence) -> bool:
        """Takes over the longest cached prefix, and what stored chunks serve behind it. The last
        token is always computed."""
        request = sequence.request
        if sequence.scores_prompt:
            return False
        known = sequence.tokens[: len(sequence.tokens) - 1]
        match = None
        if self.tree is not None and not request.params.skip_reading_prefix_cache:
            match = self.tree.match(request.namespace, known)
        if self.assemble is not None and request.chunk_spans:
            exact = 0 if match is None else match.num_tokens
            if (assembly := self.assemble(sequence, exact)) is not None:
                sequence.assembly = assembly
                again = self._match_lineage(sequence, assembly.lineage)
                if again is not None:
                    match, sequence.assembly = again, assembly.found()
                sequence.reused = sequence.assembly.reused
        if match is None or match.num_tokens == 0:
            return sequence.assembly is not None
        sequence.page_ids = list(match.page_ids)
        self.pool.retain(sequence.page_ids)
        # No lock on the node: what is retained is not evicted, and the rest of it may go.
        sequence.num_computed = match.num_tokens
        sequence.owns_tail = False
        return True

    def _match_lineage(self, sequence: Sequence, lineage: str) -> Match | None:
        """The whole prompt, if the same plan has computed it before."""
        params, wanted = sequence.request.params, sequence.num_prompt - 1
        if self.tree is None or lineage == "exact" or params.skip_reading_prefix_cache:
            return None
        known = sequence.tokens[: len(sequence.tokens) - 1]
        match = self.tree.match((params.cache_salt, lineage), known)
        return match if match.num_tokens >= wanted else None

    def _remember(self, sequence: Sequence) -> None:
        """Offers what is computed of the known tokens to the tree: what is exact in the namespace
        of all, what depends on a reuse plan in one of that plan's own."""
        computed = min(sequence.num_computed, len(sequence.tokens))
        if self.tree is None or computed == 0 or not sequence.page_ids:
            return
        namespace, assembly = sequence.request.namespace, sequence.assembly
        if assembly is not None and assembly.lineage != "exact" and computed > assembly.exact_end:
            if not assembly.repair:
                self._insert(sequence, (namespace[0], assembly.lineage), computed)
            computed = assembly.exact_end
        self._insert(sequence, namespace, computed)

    def _insert(self, sequence: Sequence, namespace: Hashable, computed: int) -> None:
        count = -(-computed // self.pool.page_size)
        assert self.tree is not None
        self.tree.insert(namespace, sequence.tokens[:computed], sequence.page_ids[:count])

    def _shares_with_prefill(self, sequence: Sequence, step: Draft) -> bool:
        """Whether a running prefill computes, now or soon, a prefix that `sequence` could reuse."""
        params, size = sequence.request.params, self.pool.page_size
        if self.tree is None or sequence.page_ids or params.skip_reading_prefix_cache:
            return False
        if sequence.scores_prompt or sequence.request.chunk_spans:
            return False
        head = sequence.tokens[:size]
        for other in self.running:
            start = step.starts.get(other, other.num_computed)
            if other.assembly is not None:
                continue
            if start >= other.num_prompt or other.tokens[:size] != head:
                continue
            if other.request.namespace != sequence.request.namespace:
                continue
            wanted = start + size  # less would not be worth the wait
            if wanted < len(sequence.tokens) and (
                sequence.tokens[:wanted] == other.tokens[:wanted]
            ):
                return True
        return False

    def _reclaim_waiting(self, keep: Sequence) -> bool:
        """Takes the pages that other waiting sequences (forks, parked) brought along."""
        held = [s for s in self.waiting if s is not keep and s.page_ids]
        for sequence in held:
            self._remember(sequence)
            self.release(sequence)
        return bool(held)

    def _rewind(self, sequence: Sequence) -> None:
        """Makes a sequence compute its last token again, so that there are logits to draw from.

        The slot may be shared, and shared KV is never modified: it counts as somebody else's.
        """
        if sequence.num_computed >= len(sequence.tokens):
            sequence.num_computed = len(sequence.tokens) - 1
            sequence.owns_tail = False
            self._trim(sequence)

    def _trim(self, sequence: Sequence) -> None:
        """Drops pages behind the computed tokens of a parked sequence."""
        count = -(-sequence.num_computed // self.pool.page_size)
        self.pool.release(sequence.page_ids[count:])
        del sequence.page_ids[count:]

    # ---- preemption -------------------------------------------------------------------------

    def preempt(self, sequence: Sequence) -> None:
        """Sends a running sequence back to the queue; its KV is computed again, or found cached."""
        self.num_preemptions += 1
        sequence.request.metrics.num_preemptions += 1
        self._remember(sequence)
        self._to_waiting(sequence)

    def _to_waiting(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free_seat(sequence)
        self.release(sequence)
        self.add(sequence)

    def _free_seat(self, sequence: Sequence) -> None:
        if sequence.seat is not None:
            self._seats.append(sequence.seat)
            sequence.seat = None

    def stuck(self) -> tuple[Sequence, OutOfPages] | None:
        """Who is first in the queue and cannot run although nobody else does, and why; or None."""
        first = next((s for s in self.waiting if self._allowed(s)), None)
        if self.running or first is None:
            return None
        wanted = -(-len(first.tokens) // self.pool.page_size)
        return first, OutOfPages(wanted, self.pool.num_free, "the rest is held by open branches")

    def check_integrity(self) -> None:
        """Asserts that pages, seats and tree agree. For tests and idle moments."""
        self.pool.check_integrity()
        if self.tree is not None:
            self.tree.check_integrity()
        seats = [s.seat for s in self.running]
        assert None not in seats, seats
        assert len(set(seats)) == len(seats), seats
        assert len(self._seats) + len(seats) == self.limits.max_num_seqs
        for sequence in (*self.running, *self.waiting):
            for page in sequence.page_ids:
                assert self.pool.ref_count(page) > 0, page
