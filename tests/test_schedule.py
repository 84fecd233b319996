"""The scheduler and the engine's loop on a device that checks every slot (`fake_device`)."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvjax.branch import Branch
from kvjax.engine import Engine
from kvjax.errors import OutOfPages, StepFailed
from kvjax.request import SamplingParams
from kvjax.sequence import Request, Sequence, Status
from tests.fake_device import END, PAGE, FakeRunner, audit, make_engine, next_token

LETTERS = st.lists(st.integers(1, 2), min_size=1, max_size=14)
COMMON = [1, 2, 2, 1, 1, 1, 2, 1, 2, 2]  # a prefix that many prompts share


def expected_output(
    request: Request, branch: int, prompt: list[int], limit: int
) -> tuple[list[int], str]:
    """What a sequence must give, whatever happened around it."""
    params, tokens = request.params, list(prompt)
    while True:
        token = next_token(request.seed, branch, tokens)
        tokens.append(token)
        if token == END:
            return tokens[len(prompt) :], "stop"
        if len(tokens) - len(prompt) == params.max_tokens or len(tokens) >= limit:
            return tokens[len(prompt) :], "length"


def check_outcome(engine: Engine, runner: FakeRunner, request: Request, aborted: bool) -> None:
    limit = engine.limits.max_model_len
    for sequence in request.sequences:
        prompt = list(request.prompt_ids)
        wanted, reason = expected_output(request, sequence.branch, prompt, limit)
        got = list(sequence.output_ids)
        assert got == wanted[: len(got)]
        if request.error is not None:
            assert sequence.finish_reason in ("error", reason)
        elif not (aborted and sequence.finish_reason == "abort"):
            assert (got, sequence.finish_reason) == (wanted, reason)
            if sequence.logprobs is not None:
                places = range(len(prompt), len(prompt) + len(got))
                assert [e[t].logprob for e, t in zip(sequence.logprobs, got, strict=True)] == [
                    -float(place) for place in places
                ]
    if request.prompt_logprobs is not None and request.sequences[0].output_ids:
        assert request.prompt_logprobs[0] is None
        for place, entry in enumerate(request.prompt_logprobs[1:], start=1):
            assert entry is not None
            assert entry[request.prompt_ids[place]].logprob == -float(place)


class EngineMachine(RuleBasedStateMachine):
    """Requests, branches, aborts and device failures in any order, on very few pages."""

    @initialize(
        num_pages=st.integers(7, 24),
        overlap=st.booleans(),
        prefix_caching=st.sampled_from([True, True, False]),
    )
    def start(self, num_pages: int, overlap: bool, prefix_caching: bool) -> None:
        self.engine, self.runner, self.intake = make_engine(
            num_pages, overlap=overlap, prefix_caching=prefix_caching
        )
        self.requests: list[Request] = []
        self.aborted: set[Request] = set()
        self.branches: list[Sequence] = []  # parked, or being run
        self.reported: set[Request] = set()
        self.idle_steps = 0

    def add(self, request: Request) -> None:
        self.requests.append(request)
        self.engine.add(request)

    def parked(self) -> list[Sequence]:
        return [s for s in self.branches if s.status is Status.FINISHED]

    def step_once(self) -> None:
        before = self.runner.num_steps
        had_flight = self.engine._in_flight is not None
        touched = set(self.engine.step())
        failed = any(r.error is not None and r not in self.reported for r in touched)
        self.reported |= touched
        moved = self.runner.num_steps > before or had_flight or failed
        self.idle_steps = 0 if moved or not self.engine.has_work else self.idle_steps + 1
        assert self.idle_steps <= 2, "nothing runs although there is work"

    # ---- rules ------------------------------------------------------------------------------

    @rule(
        prompt=LETTERS,
        shared=st.integers(0, len(COMMON)),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        max_tokens=st.sampled_from([1, 2, 5, 9, None]),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        salt=st.sampled_from([None, None, "a"]),
        scored=st.booleans(),
        seed=st.integers(0, 3),
        skip=st.sampled_from([False, False, False, True]),
        features=st.booleans(),
    )
    def request(
        self, prompt, shared, n, max_tokens, priority, salt, scored, seed, skip, features
    ) -> None:
        params = SamplingParams(
            n=n,
            max_tokens=max_tokens,
            priority=priority,
            cache_salt=salt,
            prompt_logprobs=0 if scored and len(prompt) % 3 == 0 else None,
            logprobs=0 if scored else None,
            seed=seed,
            skip_reading_prefix_cache=skip,
            presence_penalty=1.0 if features else 0.0,
        )
        self.add(self.intake.from_ids(COMMON[:shared] + prompt, params))

    @rule(prompt=LETTERS)
    def poison(self, prompt: list[int]) -> None:
        params = SamplingParams(max_tokens=8, extra_args={"poison": 1})
        self.add(self.intake.from_ids(prompt, params))

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.step_once()

    @rule(index=st.integers(0, 99))
    def abort(self, index: int) -> None:
        alive = [r for r in self.requests if not r.finished]
        if alive:
            self.aborted.add(alive[index % len(alive)])
            self.engine.abort(alive[index % len(alive)])

    @rule(index=st.integers(0, 9))
    def preempt(self, index: int) -> None:
        running = self.engine.scheduler.running
        if running:
            self.engine.scheduler.preempt(running[index % len(running)])

    @rule(mode=st.sampled_from(["dispatch", "read"]))
    def fail(self, mode: str) -> None:
        self.runner.fail_next = mode

    @rule()
    def reset(self) -> None:
        if not self.runner.lost:
            self.engine.reset_prefix_cache()

    @precondition(lambda self: len(self.branches) < 3)
    @rule(prompt=LETTERS, shared=st.integers(0, 8), salt=st.sampled_from([None, "a"]))
    def open(self, prompt: list[int], shared: int, salt: str | None) -> None:
        params = SamplingParams(max_tokens=1, cache_salt=salt)
        request = self.intake.from_ids(COMMON[:shared] + prompt, params, samples=False)
        request.sequences[0].keeps_pages = True
        self.engine.add(request)
        for _ in range(500):
            self.step_once()
            if request.finished:
                break
        assert request.finished
        if request.error is None:
            assert request.sequences[0].num_output == 0
            self.branches.append(request.sequences[0])
        else:
            self.engine.discard(request.sequences[0])

    @rule(index=st.integers(0, 9))
    def fork(self, index: int) -> None:
        parked = self.parked()
        if parked and len(self.branches) < 5:
            parent = parked[index % len(parked)]
            child = Sequence(parent.request, list(parent.tokens), keeps_pages=True)
            self.engine.park(child, parent)
            self.branches.append(child)

    @rule(
        index=st.integers(0, 9),
        hint=st.lists(st.integers(1, 2), max_size=5),
        branch=st.integers(0, 2),
    )
    def run_branch(self, index: int, hint: list[int], branch: int) -> None:
        parked = self.parked()
        if not parked:
            return
        sequence = parked[index % len(parked)]
        if len(sequence.tokens) + len(hint) > 20:
            return
        sequence.tokens += hint
        salt = sequence.request.params.cache_salt
        params = SamplingParams(max_tokens=6, seed=1, branch=branch, cache_salt=salt)
        self.add(self.intake.from_ids(list(sequence.tokens), params, sequence=sequence))
        # A parked sequence has one request at a time, whose outcome is read before the next one.
        for _ in range(index % 2 * 500):
            self.step_once()
            if self.requests[-1].finished:
                break

    @rule(index=st.integers(0, 9))
    def close(self, index: int) -> None:
        parked = self.parked()
        if parked:
            sequence = parked[index % len(parked)]
            self.branches.remove(sequence)
            self.settle(sequence)
            self.engine.discard(sequence)

    # ---- what must hold ---------------------------------------------------------------------

    @invariant()
    def everything_computed_is_there(self) -> None:
        if not hasattr(self, "engine"):
            return
        for sequence in self.parked():
            self.settle(sequence)
        for request in [r for r in self.requests if r.finished]:
            self.requests.remove(request)
            self.check(request)
        audit(self.engine, self.runner, self.parked())

    def settle(self, sequence: Sequence) -> None:
        """Checks the requests of a sequence before it goes on with another one."""
        for request in [r for r in self.requests if sequence in r.sequences]:
            assert request.finished
            self.requests.remove(request)
            self.check(request)

    def check(self, request: Request) -> None:
        aborted = request in self.aborted
        check_outcome(self.engine, self.runner, request, aborted)
        poisoned = bool(request.params.extra_args)
        if isinstance(request.error, OutOfPages):
            assert self.branches, "out of pages although nothing is held"
        elif request.error is not None:
            assert isinstance(request.error, StepFailed)
            assert poisoned or request in self.runner.blamed
        elif poisoned and not aborted:  # it ended before it could do harm
            assert len(request.sequences[0].output_ids) <= 1

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(3000):
            if not self.engine.has_work:
                break
            self.step_once()
        assert not self.engine.has_work, "never finishes"
        self.everything_computed_is_there()
        assert not self.requests
        for sequence in self.branches:
            assert sequence.status is Status.FINISHED
            self.engine.discard(sequence)
        self.engine.check_integrity()
        self.engine.reset_prefix_cache()
        pool = self.engine.scheduler.pool
        assert pool.num_free == pool.num_pages, "pages leaked"
        assert not self.engine.scheduler.running
        assert len(self.engine.scheduler._seats) == self.engine.limits.max_num_seqs


TestAnyInterleaving = EngineMachine.TestCase
TestAnyInterleaving.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)


GREEDY = SamplingParams(max_tokens=None, ignore_eos=True)


def drain(engine: Engine) -> None:
    for _ in range(3000):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError("never finishes")


def test_a_pool_smaller_than_the_context_ends_a_sequence_as_a_length_does():
    engine, _, intake = make_engine(num_pages=3)
    request = intake.from_ids([1, 2, 1], GREEDY)
    engine.add(request)
    drain(engine)
    assert request.error is None
    assert len(request.sequences[0].tokens) == 3 * PAGE + 1  # the last one's KV is not needed
    assert request.sequences[0].finish_reason == "length"


def test_pages_held_by_open_branches_queue_then_fail_typed_and_closing_them_serves():
    engine, _, intake = make_engine(num_pages=8)
    opened = intake.from_ids([1] * 22, SamplingParams(max_tokens=1), samples=False)
    opened.sequences[0].keeps_pages = True
    engine.add(opened)
    drain(engine)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    small = [
        intake.from_ids([2, 1, i + 1, 2, 1], params) for i in range(3)
    ]  # two pages: they queue
    large = intake.from_ids([2] * 15, params)
    for request in (*small, large):
        engine.add(request)
    drain(engine)
    assert [request.error for request in small] == [None] * 3
    assert isinstance(large.error, OutOfPages)
    assert large.sequences[0].finish_reason == "error"
    engine.discard(opened.sequences[0])
    again = intake.from_ids([2] * 15, params)
    engine.add(again)
    drain(engine)
    assert again.error is None


@pytest.mark.parametrize("ended_by", ["stop", "abort"])
def test_a_branch_run_again_at_once_is_not_given_the_token_that_was_discarded(ended_by):
    """Its last run ended while a step in flight still drew one token more for it."""
    engine, _, intake = make_engine(num_pages=20)
    opened = intake.from_ids([1, 2, 1, 1], SamplingParams(max_tokens=1), samples=False)
    sequence = opened.sequences[0]
    sequence.keeps_pages = True
    engine.add(opened)
    drain(engine)
    for seed in range(6):
        params = SamplingParams(max_tokens=9, seed=seed, stop_token_ids=[3])
        request = intake.from_ids(list(sequence.tokens), params, sequence=sequence)
        engine.add(request)
        while not request.finished:
            engine.step()
            if ended_by == "abort" and sequence.num_output == 2:
                engine.abort(request)
        prompt = list(request.prompt_ids)
        wanted, _ = expected_output(request, 0, prompt, engine.limits.max_model_len)
        assert list(sequence.output_ids) == wanted[: sequence.num_output]
        if len(sequence.tokens) > 25:
            break
    drain(engine)
    engine.check_integrity()


def test_the_kv_of_a_salted_branch_never_enters_another_namespace():
    engine, _, intake = make_engine(num_pages=20)
    opened = intake.from_ids([1] * 9, SamplingParams(max_tokens=1, cache_salt="a"), samples=False)
    opened.sequences[0].keeps_pages = True
    engine.add(opened)
    drain(engine)
    branch = Branch(engine, intake, opened.sequences[0], "a")
    request = branch.request(SamplingParams(max_tokens=3), engine)
    engine.add(request)
    drain(engine)
    tree = engine.scheduler.tree
    assert tree is not None
    assert tree.match((None, "exact"), [1] * 9).num_tokens == 0
    assert tree.match(("a", "exact"), [1] * 9).num_tokens == 9
    with pytest.raises(ValueError, match="cache_salt"):
        branch.request(SamplingParams(cache_salt="b"), engine)


def test_prefix_hits_copy_only_the_page_they_write_to():
    engine, runner, intake = make_engine(num_pages=30)
    first = intake.from_ids([1, 2, 2, 1, 1, 1, 2, 1, 2, 2], SamplingParams(max_tokens=1))
    engine.add(first)
    drain(engine)
    copies, computed = runner.num_copies, runner.num_computed
    second = intake.from_ids([1, 2, 2, 1, 1, 1, 1], SamplingParams(max_tokens=1))
    engine.add(second)
    drain(engine)
    assert second.num_cached_tokens == 6
    assert runner.num_copies - copies == 1
    assert runner.num_computed - computed == 1


@pytest.mark.parametrize("every", [2, 3])
def test_preempted_while_a_token_is_on_the_device_is_not_preempted(every):
    engine, _, intake = make_engine(num_pages=30)
    params = [SamplingParams(max_tokens=12, seed=seed, ignore_eos=True) for seed in range(3)]
    requests = [intake.from_ids([1, 2, 1, 1, 2], p) for p in params]
    for request in requests:
        engine.add(request)
    for step in range(1, 500):
        engine.step()
        running = engine.scheduler.running
        if step % every == 0 and running:
            engine.scheduler.preempt(running[step % len(running)])
    assert engine.scheduler.num_preemptions >= 4
    for request in requests:
        tokens = list(request.prompt_ids)
        for _ in range(12):
            tokens.append(next_token(request.seed, 0, tokens))
        assert request.sequences[0].tokens == tokens
