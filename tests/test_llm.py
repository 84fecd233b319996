"""`LLM`: batches in, outputs in order out."""

import itertools

import numpy as np
import pytest

from kvjax import LLM, SamplingParams
from kvjax.models.tokenizers import Tokenizer
from tests.tiny_model import tiny

GREEDY = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny(LLM)


def test_outputs_come_in_the_order_of_the_prompts_whatever_ends_first(llm):
    params = [
        SamplingParams(max_tokens=m, temperature=0, ignore_eos=True) for m in (9, 1, 5, 3, 7, 2)
    ]
    prompts = ["a", "b" * 40, "c", "d", "e" * 20, "f"]
    outputs = llm.generate(prompts, params)
    assert [o.prompt for o in outputs] == prompts
    assert [len(o.outputs[0].token_ids) for o in outputs] == [9, 1, 5, 3, 7, 2]
    assert all(o.finished and o.outputs[0].finished for o in outputs)
    metrics = outputs[0].metrics
    assert metrics is not None
    assert metrics.time_to_first_token is not None
    assert metrics.time_to_first_token >= 0
    assert metrics.num_output_tokens == 9


@pytest.mark.parametrize(
    "prompt",
    ["hello", [104, 101, 108, 108, 111], {"prompt": "hello"},
     {"prompt_token_ids": [104, 101, 108, 108, 111]}, list(np.array([104, 101, 108, 108, 111])),
     {"prompt_token_ids": np.array([104, 101, 108, 108, 111])}],
    ids=str,
)  # fmt: skip
def test_every_way_to_write_a_prompt_means_the_same(llm, prompt):
    expected = llm.generate(["hello"], GREEDY)[0].outputs[0].text
    assert [o.outputs[0].text for o in llm.generate(prompt, GREEDY)] == [expected]
    assert [o.outputs[0].text for o in llm.generate([prompt, prompt], GREEDY)] == [expected] * 2


def test_no_prompts_give_no_outputs(llm):
    assert llm.generate([], GREEDY) == []


def test_one_bad_prompt_refuses_the_batch_before_anything_is_run(llm):
    computed = llm.engine.runner.real_tokens
    with pytest.raises(ValueError, match="empty"):
        llm.generate(["fine", ""], GREEDY)
    with pytest.raises(ValueError, match="2 sampling params for 1"):
        llm.generate(["fine"], [GREEDY, GREEDY])
    assert llm.engine.runner.real_tokens == computed
    assert not llm.engine.scheduler.has_work


def test_a_stream_grows_and_its_last_snapshots_are_the_outputs(llm):
    expected = [o.outputs[0].text for o in llm.generate(["ab", "cd"], GREEDY)]
    seen: dict[str, list[str]] = {}
    last = {}
    for output in llm.generate_iter(["ab", "cd"], GREEDY):
        seen.setdefault(str(output.prompt), []).append(output.outputs[0].text)
        last[output.prompt] = output
    assert [last[p].outputs[0].text for p in ("ab", "cd")] == expected
    for texts in seen.values():
        assert len(texts) >= 4
        assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
    assert all(o.finished for o in last.values())


def test_two_streams_over_one_engine_both_end(llm):
    first, second = (
        llm.generate_iter("ab", GREEDY),
        llm.generate_iter("cd", SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)),
    )
    outputs = [next(first), next(second)]
    outputs += list(first)
    outputs += list(second)
    finished = {o.prompt for o in outputs if o.finished}
    assert finished == {"ab", "cd"}


def test_leaving_a_stream_aborts_what_it_asked_for(llm):
    stream = llm.generate_iter(["ab", "cd"], SamplingParams(max_tokens=90))
    next(stream)
    stream.close()
    assert not llm.engine.scheduler.has_work
    while llm.engine.has_work:
        llm.engine.step()
    llm.engine.check_integrity()


def test_it_hands_out_its_tokenizer(llm):
    tokenizer: Tokenizer = llm.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("hi")) == "hi"
