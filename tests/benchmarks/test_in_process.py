import asyncio

import pytest

from kvjax.benchmarks import workloads
from kvjax.benchmarks.client import drive
from kvjax.benchmarks.engine_manifest import Counters
from kvjax.benchmarks.in_process import InProcess
from kvjax.benchmarks.workloads import Options, Part, Request
from tests.tiny_checkpoint import write_tiny_checkpoint

OPTIONS = Options(
    num_prompts=3, input_len=12, output_len=4, vocab_size=256, context_len=16, num_contexts=3
)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    settings = {"dtype": "float32", "max_num_seqs": 1, "max_num_batched_tokens": 16,
                "max_model_len": 128, "force_reuse": True}  # fmt: skip
    model = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    found = InProcess(str(model), settings, reuse="naive")
    yield found
    asyncio.run(found.close())


def run(target, requests):
    async def go():
        records = []
        await target.reset()
        await drive(target, requests, [0.0] * len(requests), records, max_concurrency=1)
        return records

    return asyncio.run(go())


def test_passages_are_chunks_for_the_strategy_and_counted_as_shifted(target):
    records = run(target, workloads.build("long-document", OPTIONS))
    assert [r.error for r in records] == [""] * 3
    assert [(r.input_len, r.output_len) for r in records] == [(3 * 16 + 12, 4)] * 3
    for record in records:  # of the first one, too: passages are encoded by themselves, then moved
        assert record.shifted >= 2 * 16
        assert record.shifted + record.recomputed + record.cached >= 3 * 16


def test_a_repeated_prompt_is_cached_and_times_are_in_order(target):
    request = Request((Part(token_ids=tuple(range(40))),), 5)
    first, second = run(target, [request, request])
    assert (first.cached, second.cached) == (0, 39)
    assert 0 < second.ttft <= second.e2el
    assert len(second.itl) <= 4
    assert second.ttft + sum(second.itl) == pytest.approx(second.e2el)


def test_a_quoted_answer_is_part_of_the_prompt(target):
    first = Request((Part("abc"),), 4)
    second = Request((Part("abc"), Part(output_of=0), Part("d")), 2)
    a, b = run(target, [first, second])
    assert b.error == ""
    assert b.input_len > 4
    assert len(a.token_ids) == 4


def test_the_counters_see_the_steps(target):
    before = Counters.of(target.llm.engine)
    run(target, workloads.build("random", OPTIONS))
    added = Counters.of(target.llm.engine).since(before)
    assert 0 < added["padding_waste"] < 1
    assert target.about()["page_size"] == 16


def test_a_prompt_that_does_not_fit_is_an_error_of_that_request(target):
    long = Request((Part(token_ids=(1,) * 200),), 5)
    fits = Request((Part(token_ids=(1,) * 20),), 5)
    a, b = run(target, [long, fits])
    assert "128" in a.error
    assert (b.error, b.output_len) == ("", 5)
