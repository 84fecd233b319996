"""Sequences that outlive their request: opened, forked, appended to, run, closed."""

import gc
from collections.abc import Iterator

import pytest

from kvjax import LLM, Branch, KVJaxError, SamplingParams
from tests.tiny_model import tiny

PROMPT = "you are a helpful assistant. "
HINTS = ["be brief", "rhyme", "", "count to ten"]
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


@pytest.fixture
def llm() -> Iterator[LLM]:
    llm = tiny(LLM)
    llm.reset_prefix_cache()
    yield llm
    while llm.engine.has_work:
        llm.engine.step()
    llm.engine.check_integrity()
    llm.reset_prefix_cache()
    pool = llm.engine.scheduler.pool
    assert pool.num_free == pool.num_pages, "a branch left pages behind"
    assert not llm.engine._parked


def test_branches_give_what_separate_requests_give_and_compute_the_prompt_once(llm):
    expected = [o.outputs[0].text for o in llm.generate([PROMPT + h for h in HINTS], GREEDY)]
    llm.reset_prefix_cache()
    before = llm.engine.runner.real_tokens
    with llm.open(PROMPT) as root:
        assert llm.engine.runner.real_tokens - before == len(PROMPT)
        branches = root.fork(4)
        assert llm.engine.runner.real_tokens - before == len(PROMPT)
        for branch, hint in zip(branches, HINTS, strict=True):
            branch.append(hint)
        results = llm.run(branches, GREEDY)
        assert [r.outputs[0].text for r in results] == expected
        assert [r.num_cached_tokens for r in results] == [len(PROMPT)] * 2 + [
            len(PROMPT) - 1,
            len(PROMPT),
        ]
        assert branches[0].token_ids == root.token_ids + tuple(
            llm.get_tokenizer().encode(HINTS[0])
        ) + (results[0].outputs[0].token_ids)
        for branch in branches:
            branch.close()


def test_a_branch_goes_on_where_its_last_run_ended(llm):
    whole = llm.generate(PROMPT, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
    with llm.open(PROMPT) as branch:
        first = llm.run([branch], GREEDY)[0]
        second = llm.run([branch], GREEDY)[0]
        assert first.outputs[0].token_ids + second.outputs[0].token_ids == (
            whole[0].outputs[0].token_ids
        )
        assert second.num_cached_tokens >= len(PROMPT) + 5


def test_one_sampling_params_draws_like_n_completions_and_a_list_as_each_says(llm):
    params = SamplingParams(max_tokens=6, seed=5, ignore_eos=True)
    drawn = llm.generate(PROMPT, SamplingParams(max_tokens=6, seed=5, ignore_eos=True, n=3))
    texts = [c.text for c in drawn[0].outputs]
    with llm.open(PROMPT) as root:
        branches = root.fork(3)
        assert [r.outputs[0].text for r in llm.run(branches, params)] == texts
        assert [r.outputs[0].index for r in llm.run(branches, params)] == [0, 0, 0]
        for branch in branches:
            branch.close()
        again = root.fork(3)
        same = llm.run(again, [params] * 3)
        assert [r.outputs[0].text for r in same] == [texts[0]] * 3
        for branch in again:
            branch.close()


def test_a_fork_of_a_fork_outlives_both_parents(llm):
    root = llm.open(PROMPT)
    child = root.fork(1)[0].append("and ")
    grandchild = child.fork(1)[0].append("so on")
    root.close()
    child.close()
    result = llm.run([grandchild], GREEDY)[0]
    assert result.outputs[0].text == llm.generate(PROMPT + "and so on", GREEDY)[0].outputs[0].text
    grandchild.close()


def test_an_end_in_the_middle_of_a_batch_of_branches_leaves_the_next_run_right(llm):
    """What the step in flight still drew for a branch that had ended is not taken for its next."""
    text = llm.generate(PROMPT, GREEDY)[0].outputs[0].text
    with llm.open(PROMPT) as root:
        stops, goes_on = root.fork(2)
        llm.run([stops, goes_on], [SamplingParams(max_tokens=6, temperature=0, stop=[text[1:3]]),
                                   GREEDY])  # fmt: skip
        tokens = stops.token_ids
        stops.append("now")
        second = llm.run([stops], GREEDY)[0]
        assert second.prompt_token_ids == (*tokens, *llm.get_tokenizer().encode("now"))
        alone = llm.generate(list(second.prompt_token_ids), GREEDY)[0]
        assert second.outputs[0].token_ids == alone.outputs[0].token_ids
        stops.close()
        goes_on.close()


@pytest.mark.parametrize("use", ["append", "fork", "run"])
def test_a_closed_branch_is_refused(llm, use):
    branch = llm.open(PROMPT)
    branch.close()
    branch.close()
    calls = {
        "append": lambda: branch.append("x"),
        "fork": lambda: branch.fork(1),
        "run": lambda: llm.run([branch], GREEDY),
    }
    with pytest.raises(KVJaxError, match="closed"):
        calls[use]()


def test_what_a_branch_cannot_do_is_refused_and_leaves_it_usable(llm):
    with llm.open(PROMPT, cache_salt="a") as branch:
        before = branch.token_ids
        for params, said in (
            (SamplingParams(n=2), "n=1"),
            (SamplingParams(prompt_logprobs=1), "prompt_logprobs"),
            (SamplingParams(cache_salt="b"), "cache_salt"),
            (SamplingParams(stop_token_ids=[300]), "300"),
        ):
            with pytest.raises(ValueError, match=said):
                llm.run([branch], params)
        for ids, said in (([1, 256], "256"), ([1.5], "integers"), ([-1], "-1")):
            with pytest.raises(ValueError, match=said):
                branch.append(ids)
        with pytest.raises(ValueError, match="twice"):
            llm.run([branch, branch], GREEDY)
        with pytest.raises(ValueError, match="the LLM that opened it"):
            tiny(LLM, fresh=True).run([branch], GREEDY)
        with pytest.raises(ValueError, match="at least 1"):
            branch.fork(0)
        assert branch.token_ids == before
        assert isinstance(branch, Branch)
        assert llm.run([branch], GREEDY)[0].error is None


def test_branches_that_nobody_refers_to_give_their_pages_back(llm):
    """As in the README: the root is closed by its `with`, its forks are just dropped."""
    with llm.open(PROMPT) as root:
        branches = root.fork(2)
        llm.run(branches, GREEDY)
        llm.run(root.fork(2), GREEDY)
    assert len(llm.engine._parked) == 4
    del branches
    gc.collect()
    llm.generate("x", GREEDY)
    assert not llm.engine._parked


def test_an_interrupted_open_leaves_no_pages_behind(llm, monkeypatch):
    def interrupt() -> None:
        raise KeyboardInterrupt

    step = llm.engine.step
    steps = iter([step, interrupt])
    monkeypatch.setattr(llm.engine, "step", lambda: next(steps)())
    with pytest.raises(KeyboardInterrupt):
        llm.open(PROMPT + PROMPT)
    monkeypatch.undo()
