"""`AsyncLLM`: concurrent streams over one engine thread."""

import asyncio
import functools
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from kvjax import LLM, AsyncLLM, KVJaxError, SamplingParams
from kvjax.request import RequestOutput
from tests.tiny_model import tiny

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)


@pytest.fixture
def llm() -> Iterator[AsyncLLM]:
    llm = tiny(AsyncLLM)
    llm._compiles = False  # the engine is shared; one test turns it on
    yield llm
    llm.shutdown()
    for request in {s.request for s in (*running(llm), *llm.engine.scheduler.waiting)}:
        llm.engine.abort(request)
    while llm.engine.has_work:
        llm.engine.step()
    llm.engine.check_integrity()
    llm.engine.reset_prefix_cache()
    pool = llm.engine.scheduler.pool
    assert pool.num_free == pool.num_pages


def running(llm: AsyncLLM) -> list[Any]:
    return llm.engine.scheduler.running


def within(seconds: float) -> Callable[..., Any]:
    def decorate(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            asyncio.run(asyncio.wait_for(test(*args, **kwargs), seconds))

        return run

    return decorate


async def collect(llm: AsyncLLM, prompt: str, params: SamplingParams, **kw) -> list[RequestOutput]:
    return [output async for output in llm.generate(prompt, params, **kw)]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


@within(120)
async def test_concurrent_streams_give_what_each_gives_alone(llm):
    prompts = ["ab", "cd" * 20, "ef", "gh" * 9, "ij", "kl"]
    streams = await asyncio.gather(*(collect(llm, prompt, GREEDY) for prompt in prompts))
    for stream in streams:
        texts = [output.outputs[0].text for output in stream]
        assert all(texts[-1].startswith(text) for text in texts)
        assert [output.finished for output in stream[:-1]] == [False] * (len(stream) - 1)
        assert stream[-1].finished
    alone = [(await collect(llm, prompt, GREEDY))[-1].outputs[0].text for prompt in prompts]
    assert [stream[-1].outputs[0].text for stream in streams] == alone


@within(60)
async def test_an_abort_ends_the_stream_with_what_there_is(llm):
    outputs = []
    async for output in llm.generate("ab", LONG, "mine"):
        outputs.append(output)
        if len(outputs) == 3:
            await llm.abort("mine")
    assert outputs[-1].finished
    assert outputs[-1].outputs[0].finish_reason == "abort"
    assert outputs[-1].outputs[0].text.startswith(outputs[-2].outputs[0].text)
    await llm.abort("mine")
    await llm.abort("nobody")
    assert (await collect(llm, "cd", GREEDY))[-1].finished


@within(60)
async def test_leaving_the_iteration_aborts_the_request(llm):
    async for _ in llm.generate("ab", LONG):
        break
    await until(lambda: not running(llm))
    assert not llm._streams


@within(60)
async def test_cancelling_the_task_aborts_the_request(llm):
    task = asyncio.create_task(collect(llm, "ab", LONG))
    await until(lambda: bool(running(llm)))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not running(llm))
    assert (await collect(llm, "cd", GREEDY))[-1].finished


@within(60)
async def test_a_request_id_in_use_is_refused_and_its_owner_goes_on(llm):
    first = asyncio.create_task(collect(llm, "ab", LONG, request_id="same"))
    await until(lambda: bool(running(llm)))
    with pytest.raises(ValueError, match="same"):
        await collect(llm, "cd", GREEDY, request_id="same")
    assert (await first)[-1].outputs[0].finish_reason == "length"
    assert (await collect(llm, "cd", GREEDY, request_id="same"))[-1].finished


@within(60)
async def test_bad_input_raises_before_any_device_work(llm):
    computed = llm.engine.runner.real_tokens
    for prompt in ("", [999], [3] * 500):
        with pytest.raises(ValueError, match=r"empty|999|500"):
            await collect(llm, prompt, GREEDY)  # type: ignore[arg-type]
    assert llm.engine.runner.real_tokens == computed


@within(60)
async def test_a_request_that_fails_raises_its_own_error(llm):
    task = asyncio.create_task(collect(llm, "ab", LONG, request_id="bad"))
    other = asyncio.create_task(collect(llm, "cd", GREEDY))
    await until(lambda: "bad" in llm._streams and bool(running(llm)))
    error = KVJaxError("broken")
    await llm.call(lambda: llm.engine._fail(llm._streams["bad"].request, error))
    with pytest.raises(KVJaxError, match="broken"):
        await task
    assert (await other)[-1].finished


@within(60)
async def test_work_between_two_steps_returns_its_result_or_raises(llm):
    assert await llm.call(lambda: threading.current_thread().name) == "kvjax-engine"
    with pytest.raises(ZeroDivisionError):
        await llm.call(lambda: 1 / 0)
    assert await llm.reset_prefix_cache() >= 0
    cancelled = asyncio.create_task(llm.call(lambda: 1))
    await asyncio.sleep(0)
    cancelled.cancel()
    assert (await collect(llm, "cd", GREEDY))[-1].finished


@within(60)
async def test_shutdown_closes_streams_and_refuses_requests(llm):
    streams = [asyncio.create_task(collect(llm, p, LONG)) for p in ("ab", "cd")]
    await until(lambda: len(running(llm)) == 2)
    await asyncio.to_thread(llm.shutdown)
    for stream in streams:
        with pytest.raises(KVJaxError, match="shut down"):
            await stream
    for late in (collect(llm, "ab", GREEDY), llm.abort("x"), llm.call(lambda: 1)):
        with pytest.raises(KVJaxError, match="shut down"):
            await late
    llm.shutdown()


LEAVES = """
import atexit
from kvjax import AsyncLLM
from tests.tiny_model import tiny

atexit.register(lambda: print("alive" if llm._thread.is_alive() else "over"))  # the last to run
llm = tiny(AsyncLLM, fresh=True)
"""


def test_a_program_that_ends_without_shutdown_ends_the_thread_first():
    """A thread that is inside XLA when the interpreter goes away aborts the process."""
    command = [sys.executable, "-c", LEAVES]
    left = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert (left.stdout, left.returncode) == ("over\n", 0), left.stderr


@within(60)
async def test_what_was_queued_when_the_thread_ended_is_told_so(llm):
    go = threading.Event()
    waiting = asyncio.create_task(llm.call(go.wait))  # the thread is busy
    await asyncio.sleep(0.05)
    late = [asyncio.create_task(collect(llm, "ab", GREEDY)), asyncio.create_task(llm.call(dict))]
    await until(lambda: len(llm._calls) == 2)
    llm._stopping = True
    go.set()
    assert await waiting
    for task in late:
        with pytest.raises(KVJaxError, match="shut down"):
            await task


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@within(60)
async def test_an_engine_that_breaks_says_so_to_everybody(llm, monkeypatch):
    def broken() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(llm.engine, "step", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        await collect(llm, "ab", GREEDY)
    await until(lambda: not llm._thread.is_alive())
    with pytest.raises(KVJaxError, match="shut down") as late:
        await collect(llm, "ab", GREEDY)
    assert str(late.value.__cause__) == "a bug"
    monkeypatch.undo()


def test_a_caller_whose_loop_is_gone_has_its_request_aborted(llm):
    async def begin() -> Any:
        stream = llm.generate("ab", LONG)
        await anext(stream)
        streams.append(stream)  # nobody closes it

    streams: list[Any] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    loop.close()

    async def rest() -> None:
        await until(lambda: not running(llm))

    asyncio.run(asyncio.wait_for(rest(), 60))
    assert not llm._streams
    assert asyncio.run(collect(llm, "cd", GREEDY))[-1].finished


@within(100)
async def test_idle_time_is_used_to_compile_what_is_missing(llm):
    runner = llm.engine.runner
    if runner.is_warm:
        del runner._programs["copy_pages"]
    before = runner.compiles
    llm._compiles = True
    await llm.call(lambda: None)
    await until(lambda: runner.is_warm)
    assert runner.compiles > before


def test_it_gives_what_the_library_gives(llm):
    expected = tiny(LLM).generate("one two", GREEDY)[0].outputs[0].text
    assert asyncio.run(collect(llm, "one two", GREEDY))[-1].outputs[0].text == expected
