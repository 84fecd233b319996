import asyncio

import numpy as np
import pytest

from kvjax.benchmarks.client import Record, drive
from kvjax.benchmarks.figures import figures
from kvjax.benchmarks.http_stream import Refused, Unreachable
from kvjax.benchmarks.openai_target import OpenAITarget
from kvjax.benchmarks.workloads import Part, Request
from tests.benchmarks.known_delays import KnownDelays

IDS = Request((Part(token_ids=(1, 2, 3)),), 6)
TEXT = Request((Part("abc"),), 2)


def measure(server, requests, times=None, **how):
    """Runs the requests against the server; its records, the seconds, and the server."""

    async def go():
        async with server:
            target = OpenAITarget(server.url, None)
            await target.check()
            records: list[Record] = []
            times_ = [0.0] * len(requests) if times is None else times
            return records, await drive(target, requests, times_, records, **how)

    records, seconds = asyncio.run(go())
    return records, seconds, server


def within(measured_ms, known_ms):
    return abs(measured_ms - known_ms) <= max(0.02 * known_ms, 3.0)


def test_known_delays_are_measured_within_two_percent_or_three_milliseconds():
    requests = [IDS] * 8
    records, seconds, server = measure(
        KnownDelays(first=0.2, gap=0.05), requests, [0.1 * i for i in range(8)]
    )
    found = figures(records, seconds)
    assert found["completed"] == 8
    known = 1000 * np.array(server.outputs)  # [requests, outputs], 200 and 50 ms apart or more
    assert known[:, 0].min() >= 200
    assert known[:, -1].min() >= 450
    assert within(found["median_ttft_ms"], np.median(known[:, 0]))
    assert within(found["mean_ttft_ms"], known[:, 0].mean())
    assert within(found["median_itl_ms"], np.median(np.diff(known)))
    assert within(found["mean_tpot_ms"], (known[:, -1] - known[:, 0]).mean() / 5)
    assert within(found["median_e2el_ms"], np.median(known[:, -1]))
    assert within(1000 * found["duration"], 1000 * records[-1].sent + known[-1, -1])
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (24, 48)
    assert (found["total_cached_tokens"], found["cache_hit_rate"]) == (16, pytest.approx(2 / 3))


def test_a_concurrency_cap_holds_and_its_queueing_is_not_in_the_latencies():
    records, _, server = measure(KnownDelays(first=0.06), [TEXT] * 6, max_concurrency=2)
    assert server.most == 2
    assert max(r.ttft or 9 for r in records) < 0.1
    assert max(r.queued for r in records) > 0.12


def test_requests_are_sent_when_they_are_due():
    records, _, _ = measure(KnownDelays(0.01, 0.01), [TEXT] * 3, [0.0, 0.15, 0.3])
    assert [r.sent for r in records] == pytest.approx([0.0, 0.15, 0.3], abs=0.02)


def test_ids_and_text_are_sent_as_what_they_are():
    _, _, server = measure(KnownDelays(0, 0), [IDS, TEXT])
    assert sorted(str(b["prompt"]) for b in server.bodies) == ["[1, 2, 3]", "abc"]
    assert {b["model"] for b in server.bodies} == {"known"}


def test_a_request_follows_the_answers_that_it_quotes():
    second = Request((Part("abc"), Part(output_of=0), Part("d")), 1)
    _, _, server = measure(KnownDelays(0.02, 0.01), [TEXT, second])
    assert [b["prompt"] for b in server.bodies] == ["abc", "abc x xd"]


def test_a_refused_request_keeps_its_reason_and_the_others_their_times():
    second = Request((Part("abc"), Part(output_of=0)), 1)
    records, seconds, _ = measure(KnownDelays(0, 0, fail_on=0), [TEXT, second, TEXT])
    errors = [r.error for r in records]
    assert sum("HTTP 400: no room" in e for e in errors) in (1, 2)
    found = figures(records, seconds)
    assert found["completed"] + found["failed"] == 3
    assert found["completed"] >= 1


def test_a_connection_that_breaks_is_an_error_of_that_request_alone():
    records, _, _ = measure(KnownDelays(0, 0, die_after=0), [TEXT, TEXT])
    assert ["closed the connection" in r.error for r in records].count(True) == 1


def test_a_server_that_is_not_there_is_said_so():
    async def go():
        async with KnownDelays() as server:
            url = server.url
        await OpenAITarget(url, None).check(timeout_s=0.3)

    with pytest.raises(Unreachable, match=r"cannot reach http://127.0.0.1:\d+"):
        asyncio.run(go())


def test_a_model_that_the_server_does_not_have_is_said_with_those_it_has():
    async def go():
        async with KnownDelays(model="other") as server:
            await OpenAITarget(server.url, "mine").check()

    with pytest.raises(ValueError, match="has no model 'mine'; it has 'other'"):
        asyncio.run(go())


def test_an_address_that_is_no_url_is_refused():
    with pytest.raises(ValueError, match="expected an http or https URL, got 'ftp://x/v1/models'"):
        asyncio.run(OpenAITarget("ftp://x", None).check())


def test_ids_do_not_go_to_a_chat_endpoint():
    async def go():
        target = OpenAITarget("http://127.0.0.1:1", "m", endpoint="/v1/chat/completions")
        await target.send(IDS.parts, IDS, Record())

    with pytest.raises(ValueError, match="token ids, which only /v1/completions takes"):
        asyncio.run(go())


def test_the_cache_is_emptied_by_the_server_that_can():
    async def go():
        async with KnownDelays() as server:
            await OpenAITarget(server.url, None).reset()
            return server.resets

    assert asyncio.run(go()) == 1


def test_a_refusal_has_its_status():
    error = Refused(503, "busy")
    assert (error.status, str(error)) == (503, "HTTP 503: busy")
