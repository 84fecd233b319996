"""A server under mixed load: cancels, forks, sessions, preemptions. `make soak` runs it longer."""

import asyncio
import collections
import gc
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from kvjax import LLM, SamplingParams
from tests.serving.live_server import ENGINE, Client, serving

SECONDS = float(os.environ.get("KVJAX_SOAK_SECONDS", "180"))
CLIENTS, QUESTIONS = 12, 30
PAGES = {"kv_cache_memory": 30 * 8192}  # few, so that requests are preempted
FLAT = 4 << 20  # bytes that memory may grow by between two halves of the load


def question(number: int) -> dict[str, Any]:
    """One of the requests whose answers are known."""
    head = f"topic {number % 5} " * (3 + number % 7)
    asked: dict[str, Any] = {
        "prompt": f"{head}question {number}",
        "max_tokens": 20 + 5 * (number % 9),
        "temperature": float(number % 2),
        "seed": number,
        "n": 1 + number % 3,
        "ignore_eos": True,
    }
    if number % 5 == 4:
        asked["structured_outputs"] = {"regex": "[a-z]{5,60}"}
    return asked


def offline(model: Path) -> list[list[str]]:
    """What the library answers, one request at a time."""
    settings = {k: v for k, v in ENGINE.items() if k != "tensor_parallel_size"}
    llm = LLM(model, **settings)
    answers = []
    for number in range(QUESTIONS):
        asked = question(number)
        prompt = asked.pop("prompt")
        answers.append([c.text for c in llm.generate(prompt, SamplingParams(**asked))[0].outputs])
    return answers


class Load:
    """Clients that ask, compare, and now and then leave: in a stream, or before any answer."""

    def __init__(self, client: Client, expected: list[list[str]]) -> None:
        self._url, self._expected = f"{client.url}/v1", expected
        self.counts: collections.Counter[str] = collections.Counter()
        self.memory: list[int] = []

    async def run(self, seconds: float) -> None:
        """Loads the server for so long; whatever is under way then is waited for."""
        deadline = time.monotonic() + seconds
        sdk = openai.AsyncOpenAI(base_url=self._url, api_key="none", max_retries=2)

        async def worker(seed: float) -> None:
            dice = random.Random(seed)
            while time.monotonic() < deadline:
                await self._one(sdk, dice)

        async def watch() -> None:
            process = psutil.Process()
            while time.monotonic() < deadline:
                await asyncio.sleep(0.5)
                self.memory.append(process.memory_info().rss)

        async with asyncio.TaskGroup() as tasks:
            for number in range(CLIENTS):
                tasks.create_task(worker(deadline + number))
            tasks.create_task(watch())
        await sdk.close()

    async def _one(self, sdk: openai.AsyncOpenAI, dice: random.Random) -> None:
        number = dice.randrange(QUESTIONS)
        body: dict[str, Any] = question(number) | {"priority": dice.randrange(3)}
        if dice.random() < 0.3:
            body |= {"session_id": f"s{dice.randrange(6)}", "session_seconds": 2}
        names = ("prompt", "max_tokens", "temperature", "seed", "n")
        extra = {k: v for k, v in body.items() if k not in names}
        ask: dict[str, Any] = {k: body[k] for k in names} | {"model": "tiny", "extra_body": extra}
        if dice.random() < 0.3:
            await self._whole(sdk, ask, number, dice)
        else:
            await self._streamed(sdk, ask, number, dice)

    async def _whole(self, sdk: Any, ask: dict[str, Any], number: int, dice: Any) -> None:
        patience = dice.uniform(0.0, 0.5) if dice.random() < 0.35 else None
        try:
            async with asyncio.timeout(patience):
                answer = await sdk.completions.create(**ask)
        except TimeoutError:
            self.counts["left before the answer"] += 1
            return
        self._compare(number, [choice.text for choice in answer.choices])

    async def _streamed(self, sdk: Any, ask: dict[str, Any], number: int, dice: Any) -> None:
        leaves = dice.randrange(1, 30) if dice.random() < 0.35 else None
        texts, pieces = [""] * ask["n"], 0
        async with await sdk.completions.create(**ask, stream=True) as stream:
            async for chunk in stream:
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
                pieces += 1
                if pieces == leaves:
                    self.counts["left in a stream"] += 1
                    return
        self._compare(number, texts)

    def _compare(self, number: int, texts: list[str]) -> None:
        assert texts == self._expected[number], number
        self.counts["compared"] += 1
        self.counts["compared with forks"] += len(texts) > 1
        self.counts["compared with a grammar"] += number % 5 == 4


def count_forks(client: Client, counts: collections.Counter[str]) -> None:
    """Counts the sequences that share the pages of another from now on."""
    scheduler = client.engine.scheduler
    fork = scheduler.fork

    def counted(*args: Any) -> None:
        counts["forks"] += 1
        fork(*args)

    scheduler.fork = counted


def grown(memory: list[int]) -> float:
    """Bytes between the medians of the two halves."""
    half = len(memory) // 2
    return statistics.median(memory[half:]) - statistics.median(memory[:half])


# The client's unfinished streams are collected in whichever thread is running.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_under_load_every_answer_is_the_offline_one_and_nothing_grows(tiny_path):
    expected = offline(tiny_path)
    with serving(tiny_path, PAGES) as client:
        asyncio.run(Load(client, expected).run(SECONDS / 3))  # until all is warm
        before = {n: client.metric(f"{n}_total") for n in ("compilations", "num_preemptions")}
        gc.collect()
        load = Load(client, expected)
        count_forks(client, load.counts)
        asyncio.run(load.run(SECONDS * 2 / 3))
        counts = load.counts
        counts["preemptions"] = int(
            client.metric("num_preemptions_total") - before["num_preemptions"]
        )
        print(f"\n{dict(counts)}, memory {grown(load.memory) / 2**20:+.2f} MiB")
        assert counts["compared"] > 4 * QUESTIONS
        for what in (
            "left in a stream", "left before the answer", "forks", "preemptions",
            "compared with forks", "compared with a grammar",
        ):  # fmt: skip
            assert counts[what] > 0, f"the load had no case of: {what}"
        assert grown(load.memory) < FLAT
        assert client.metric("compilations_total") == before["compilations"]
        client.settled()
        for session in client.get("/v1/sessions")[1]["sessions"]:
            client.request("DELETE", f"/v1/sessions/{session['id']}").read()
        client.post("/v1/kv/reset", {})
        pages = client.get("/v1/kv/stats")[1]["pages"]
        assert pages["free"] == pages["total"], "pages leaked"
