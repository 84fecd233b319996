"""A server under mixed load: cancels, forks, sessions, preemptions. `make soak` runs it longer."""

import asyncio
import os
import random
import time
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from kvjax import LLM, SamplingParams
from tests.serving.live_server import ENGINE, Client, serving

SECONDS = float(os.environ.get("KVJAX_SOAK_SECONDS", "45"))
CLIENTS, QUESTIONS = 12, 24
PAGES = {"kv_cache_memory": 30 * 8192}  # few, so that requests are preempted


def question(number: int) -> dict[str, Any]:
    """One of the requests whose answers are known."""
    head = f"topic {number % 5} " * (3 + number % 7)
    return {
        "prompt": f"{head}question {number}",
        "max_tokens": 20 + 5 * (number % 9),
        "temperature": float(number % 2),
        "seed": number,
        "n": 1 + number % 3,
    }


def offline(model: Path) -> list[list[str]]:
    """What the library answers, one request at a time."""
    settings = {k: v for k, v in ENGINE.items() if k != "tensor_parallel_size"}
    llm = LLM(model, **settings)
    answers = []
    for number in range(QUESTIONS):
        asked = question(number)
        params = SamplingParams(
            ignore_eos=True, **{k: v for k, v in asked.items() if k != "prompt"}
        )
        answers.append([c.text for c in llm.generate(asked["prompt"], params)[0].outputs])
    return answers


async def load(client: Client, expected: list[list[str]], deadline: float) -> dict[str, int]:
    """Clients that ask, compare, and now and then leave in the middle."""
    counts = {"compared": 0, "left": 0}
    sdk = openai.AsyncOpenAI(base_url=f"{client.url}/v1", api_key="none", max_retries=2)

    async def one(dice: random.Random) -> None:
        number = dice.randrange(QUESTIONS)
        body: dict[str, Any] = {"model": "tiny", **question(number)}
        extra: dict[str, Any] = {"ignore_eos": True, "priority": dice.randrange(3)}
        if dice.random() < 0.3:
            extra |= {"session_id": f"s{dice.randrange(6)}", "session_seconds": 2}
        stream = await sdk.completions.create(**body, stream=True, extra_body=extra)
        leaves = dice.randrange(1, 30) if dice.random() < 0.35 else None
        texts = [""] * body["n"]
        pieces = 0
        async with stream:
            async for chunk in stream:
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
                pieces += 1
                if pieces == leaves:
                    break
        if pieces == leaves:
            counts["left"] += 1
            return
        assert texts == expected[number], number
        counts["compared"] += 1

    async def worker(seed: int) -> None:
        dice = random.Random(seed)
        while time.monotonic() < deadline:
            await one(dice)

    async with asyncio.TaskGroup() as tasks:
        for seed in range(CLIENTS):
            tasks.create_task(worker(seed))
    await sdk.close()
    return counts


# The client's unfinished streams are collected in whichever thread is running.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_under_load_every_answer_is_the_offline_one_and_nothing_grows(tiny_path):
    expected = offline(tiny_path)
    with serving(tiny_path, PAGES) as client:
        asyncio.run(load(client, expected, time.monotonic() + SECONDS / 3))  # until all is warm
        compiled = client.metric("compilations_total")
        process = psutil.Process()
        memory = process.memory_info().rss
        counts = asyncio.run(load(client, expected, time.monotonic() + SECONDS * 2 / 3))
        grown = process.memory_info().rss - memory
        preempted = client.metric("num_preemptions_total")
        print(f"{counts}, {preempted:.0f} preemptions, memory {grown / 2**20:+.1f} MiB")
        assert counts["compared"] > SECONDS
        assert counts["left"] > 0
        assert preempted > 0
        assert grown < 40 * 2**20
        assert client.metric("compilations_total") == compiled
        client.settled()
        for session in client.get("/v1/sessions")[1]["sessions"]:
            client.request("DELETE", f"/v1/sessions/{session['id']}").read()
        client.post("/v1/kv/reset", {})
        pages = client.get("/v1/kv/stats")[1]["pages"]
        assert pages["free"] == pages["total"], "pages leaked"
