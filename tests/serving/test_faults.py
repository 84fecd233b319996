"""Steps that fail, hang or never come: who is told, and who goes on."""

import concurrent.futures
import logging
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import runner
from kvjax.decode import LOGIT_STAGES, register_stage
from tests.serving.live_server import Client, serving, until
from tests.small_device import Memory

PROMPTS = ["one fox", "two dogs run", "three", "four lazy cats"]
BODY = {"max_tokens": 12, "temperature": 1, "seed": 7, "ignore_eos": True}


class Sabotage:
    """A logit stage from outside that raises inside the device's step for rows that ask for it."""

    name = "served_sabotage"
    arguments = {"served_sabotage": 0.0}  # noqa: RUF012 - the protocol's shape

    def wanted(self, rows: Any) -> Any:
        return rows.extra["served_sabotage"] > 0

    def apply(self, logits: Any, state: Any, rows: Any) -> Any:
        def check(values: Any, flags: Any, positions: Any) -> Any:
            if np.any((np.asarray(flags) > 0) & (np.asarray(positions) >= flags)):
                raise ValueError("sabotage")
            return np.asarray(values)

        flags = rows.extra["served_sabotage"]
        shape = jax.ShapeDtypeStruct(logits.shape, jnp.float32)
        return jax.pure_callback(check, shape, logits, flags, rows.positions)


@pytest.fixture(scope="module")
def fragile(tiny_path) -> Iterator[Client]:
    stage = Sabotage()
    register_stage(stage)
    try:
        with serving(tiny_path, step_timeout=2.0) as client:
            yield client
    finally:
        LOGIT_STAGES.remove(stage)


def ask(client: Client, prompt: str, **more: Any) -> tuple[int, Any]:
    return client.post("/v1/completions", {**BODY, "prompt": prompt, **more})


def test_a_step_that_fails_is_a_500_with_an_id_and_innocents_keep_their_tokens(fragile):
    alone = [ask(fragile, prompt)[1]["choices"] for prompt in PROMPTS]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        innocent = [pool.submit(ask, fragile, prompt) for prompt in PROMPTS[:3]]
        wicked = pool.submit(
            fragile.post,
            "/v1/completions",
            {**BODY, "prompt": "evil", "extra_args": {"served_sabotage": 6}},
            **{"X-Request-Id": "find-me"},
        )
        status, answer = wicked.result()
        assert status == 500
        assert answer["error"]["code"] == "step_failed"
        assert "find-me" in answer["error"]["message"]
        for got, expected in zip(innocent, alone, strict=False):
            assert got.result()[0] == 200
            assert got.result()[1]["choices"] == expected
    fragile.settled()
    assert fragile.get("/health") == (200, {"status": "ok"})
    assert fragile.metric('request_success_total{finished_reason="error"}') >= 1


def test_a_stream_that_fails_ends_with_an_error_event(fragile):
    body = {**BODY, "prompt": "evil", "stream": True, "extra_args": {"served_sabotage": 8}}
    answer = fragile.request("POST", "/v1/completions", body)
    assert answer.status == 200
    text = answer.read().decode()
    assert '"code":"step_failed"' in text
    assert text.endswith("data: [DONE]\n\n")
    fragile.settled()


def test_a_device_out_of_memory_gets_smaller_steps_says_so_and_changes_no_token(
    served, tiny_path, caplog, monkeypatch
):
    alone = [ask(served, prompt)[1]["choices"] for prompt in PROMPTS]
    memory = Memory()
    memory.tokens, memory.seqs = 16, 2
    monkeypatch.setattr(runner, "step", memory.step)
    with (
        serving(tiny_path) as client,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
        caplog.at_level(logging.WARNING, "kvjax"),
    ):
        assert client.metric("out_of_memory_total") == 0
        asked = [pool.submit(ask, client, prompt) for prompt in PROMPTS]
        streamed = client.stream("/v1/completions", {**BODY, "prompt": PROMPTS[0]})
        assert [request.result()[0] for request in asked] == [200] * len(PROMPTS)
        assert [request.result()[1]["choices"] for request in asked] == alone
        assert "".join(e["choices"][0]["text"] for e in streamed) == alone[0][0]["text"]
        said = [text for text in caplog.messages if "ran out of memory" in text]
        assert client.metric("out_of_memory_total") == len(said) == 2
        assert client.metric("step_token_budget") == 16
        assert client.metric("step_sequence_budget") == 2
        assert client.get("/health") == (200, {"status": "ok"})
        assert ask(client, PROMPTS[1])[1]["choices"] == alone[1]
        assert client.metric("out_of_memory_total") == 2, "what was too large is not tried again"
        client.settled()


def test_a_step_that_hangs_turns_health_red_until_it_is_over(fragile, caplog):
    hung, go = threading.Event(), threading.Event()
    step = fragile.engine.step

    def stuck() -> Any:
        hung.set()
        assert go.wait(30)
        return step()

    fragile.engine.step = stuck
    with concurrent.futures.ThreadPoolExecutor() as pool, caplog.at_level(logging.ERROR, "kvjax"):
        waiting = pool.submit(ask, fragile, "ab")
        assert hung.wait(10)
        assert fragile.get("/health")[0] == 200, "it does not hang yet"
        until(lambda: fragile.get("/health") == (503, {"status": "hung"}), 20)
        assert fragile.get("/ready") == (503, {"status": "hung"})
        assert fragile.metric("step_age_seconds") > 2
        del fragile.engine.step
        go.set()
        assert waiting.result()[0] == 200
        until(lambda: fragile.get("/health") == (200, {"status": "ok"}), 20)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_is_gone_turns_health_red_for_good(tiny_path):
    with serving(tiny_path) as client:

        def broken() -> Any:
            raise RuntimeError("a bug")

        client.engine.step = broken
        status, answer = ask(client, "ab")
        assert (status, answer["error"]["code"]) == (500, "internal_error")
        assert client.get("/health") == (503, {"status": "dead"})
        assert ask(client, "ab")[0] == 503
