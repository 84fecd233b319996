import asyncio
import json
import os
import signal
import threading

import pytest

from kvjax.benchmarks.__main__ import main
from tests.benchmarks.known_delays import KnownDelays
from tests.benchmarks.result_schema import complaints
from tests.tiny_checkpoint import write_tiny_checkpoint

SMALL = ["--num-prompts=4", "--input-len=12", "--output-len=5", "--vocab-size=256"]
ENGINE = ["--dtype=float32", "--max-num-seqs=1", "--max-num-batched-tokens=16",
          "--max-model-len=128"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def server():
    """A server with known delays, in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    known = KnownDelays(first=0.02, gap=0.01)
    asyncio.run_coroutine_threadsafe(known.__aenter__(), loop).result()
    yield known

    async def end():
        await known.__aexit__()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    asyncio.run_coroutine_threadsafe(end(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def run(folder, *words):
    status = main(["serve", f"--result-dir={folder}", "--result-filename=r.json", *words])
    return status, json.loads((folder / "r.json").read_text())


@pytest.mark.slow  # every program of an engine is compiled
def test_an_engine_in_process_is_measured(tmp_path, model, capsys):
    words = ["--dataset-name=shared-prefix", "--prefix-len=48", "--num-prefixes=1", "--rounds=2",
             "--goodput", "ttft:60000", "e2el:60000", "--max-concurrency=1"]  # fmt: skip
    status, record = run(tmp_path, f"--model={model}", *ENGINE, *SMALL, *words)
    assert (status, complaints(record)) == (0, [])
    assert record["status"] == "complete"
    assert (record["completed"], record["failed"]) == (8, 0)
    assert record["output_lens"] == [5] * 8
    assert record["compiles"] == 0  # the run itself compiled nothing
    assert record["programs"] > 0
    assert record["compile_seconds"] > 0
    assert 0 < record["padding_waste"] < 1
    assert record["steps"] >= 2 * 4 * 5
    assert 0 < record["share_of_compute"] < 1
    assert 0 < record["share_of_bandwidth"] < 1
    assert record["manifest"]["ceilings"]["matmul"] > 1e9
    assert record["total_cached_tokens"] in range(2 * 3 * 48, 2 * 3 * 51)  # of each round's last 3
    assert record["request_goodput"] == record["request_throughput"]
    assert record["max_concurrent_requests"] == 1
    assert record["peak_rss_mib"] > 50
    assert len(record["rounds"]) == 2
    assert record["manifest"]["engine"]["dtypes"]["weights"] == "float32"
    assert record["manifest"]["workload"]["prefix_share"] > 0.4
    assert "=== Serving Benchmark Result ===" in capsys.readouterr().out


@pytest.mark.slow
def test_passages_are_served_by_a_reuse_strategy(tmp_path, model):
    words = ["--dataset-name=long-document", "--context-len=16", "--num-contexts=3",
             "--reuse=naive", "--engine-option=force_reuse=true"]  # fmt: skip
    words += ["--max-concurrency=1", "--profile"]
    _, record = run(tmp_path, f"--model={model}", *ENGINE, *SMALL, *words)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert record["padding_waste"] is None
    assert record["failed"] == 0
    assert record["total_shifted_tokens"] >= 3 * 16


def test_a_server_is_measured_by_its_url(tmp_path, server):
    status, record = run(
        tmp_path, f"--base-url={server.url}/v1", *SMALL, "--extra-body", '{"user": "me"}'
    )
    assert (status, complaints(record)) == (0, [])
    assert record["model_id"] == "known"
    assert record["backend"] == "openai"
    assert 20 <= record["median_ttft_ms"] < 200
    assert server.bodies[-1]["user"] == "me"
    assert server.bodies[-1]["ignore_eos"] is True
    assert len(server.bodies) == 5  # one to warm up
    assert server.resets == 1


def test_bodies_have_what_vllm_bench_sends(tmp_path, server):
    words = ["--logprobs=2", "--use-beam-search", "--chat-template-kwargs", '{"think": false}',
             "--lora-modules", "a", "b", "--lora-assignment=round-robin"]  # fmt: skip
    status, _ = run(tmp_path, f"--base-url={server.url}", *SMALL, *words, "--max-concurrency=1")
    assert status == 0
    assert [body["model"] for body in server.bodies] == ["a", "b", "a", "b", "a"]
    assert server.bodies[0]["logprobs"] == 2
    assert server.bodies[0]["use_beam_search"] is True
    assert server.bodies[0]["chat_template_kwargs"] == {"think": False}


def test_waiting_for_the_cap_has_figures_of_its_own(tmp_path, server):
    wanted = "--percentile-metrics=ttft,client_queue_time,e2el_including_client_queue"
    _, record = run(tmp_path, f"--base-url={server.url}", *SMALL, "--max-concurrency=1", wanted)
    assert complaints(record) == []
    assert record["mean_client_queue_time_ms"] > 50  # three of four wait for others of 60 ms each
    both = record["mean_e2el_ms"] + record["mean_client_queue_time_ms"]
    assert record["mean_e2el_including_client_queue_ms"] == pytest.approx(both)
    assert "p99_e2el_ms" not in record


def test_probes_are_sent_beside_the_load_and_reported_apart(tmp_path, server):
    status, record = run(
        tmp_path, f"--base-url={server.url}", *SMALL, "--max-concurrency=1", "--num-warmups=0",
        "--probe-request-rate=20",
    )  # fmt: skip
    assert (status, complaints(record)) == (0, [])
    assert record["completed"] == 4
    assert 2 <= record["probe_completed"] <= 10
    assert 20 <= record["probe_median_e2el_ms"] <= record["probe_max_e2el_ms"]
    assert sum(body["max_tokens"] == 1 for body in server.bodies) >= record["probe_completed"]


def test_appended_results_are_lines_of_one_file_and_compare(tmp_path, server):
    words = ["serve", f"--result-dir={tmp_path}", "--result-filename=r.jsonl", "--append-result",
             f"--base-url={server.url}", *SMALL]  # fmt: skip
    assert [main(words), main(words)] == [0, 0]
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["complete", "complete"]
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]
    paths = [str(tmp_path / "r.jsonl")] * 2
    assert main(["compare", *paths]) == 0
    assert main(["report", paths[0], "-o", str(tmp_path / "r.html")]) == 0


def test_pages_of_the_requests_are_written_beside_the_result(tmp_path, server):
    run(tmp_path, f"--base-url={server.url}", *SMALL, "--plot-timeline", "--plot-dataset-stats")
    timeline = (tmp_path / "r.timeline.html").read_text()
    assert timeline.count("<rect") >= 4 * 2 + 1
    assert "time (s)" in timeline
    stats = (tmp_path / "r.dataset_stats.html").read_text()
    assert "Prompt lengths" in stats
    assert "Answer lengths" in stats


def test_a_server_s_profiler_is_started_and_stopped(tmp_path, server):
    run(tmp_path, f"--base-url={server.url}", *SMALL, "--profile")
    assert server.profiles == ["/start_profile", "/stop_profile"]


def test_failed_requests_are_counted_and_the_others_kept(tmp_path, server):
    server.fail_on = 2
    status, record = run(tmp_path, f"--base-url={server.url}", *SMALL)
    assert (status, record["completed"], record["failed"]) == (1, 3, 1)
    assert complaints(record) == []
    assert sum("no room" in error for error in record["errors"]) == 1


def test_an_interrupted_run_keeps_what_it_measured(tmp_path, server, capsys):
    server.gap = 0.01
    timer = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    words = ["--num-prompts=40", "--input-len=4", "--output-len=2", "--request-rate=10"]
    status, record = run(tmp_path, f"--base-url={server.url}", *words, "--num-warmups=0")
    assert status == 130
    assert record["status"] == "interrupted"
    assert 2 <= record["completed"] < 40
    assert record["errors"].count("not finished") == 40 - record["completed"]
    assert "interrupted: what was measured is in" in capsys.readouterr().out


def test_nobody_at_the_url_is_said_and_leaves_no_result(tmp_path, capsys):
    words = ["serve", "--base-url=http://127.0.0.1:9", f"--result-dir={tmp_path}", *SMALL]
    assert main(words) == 2
    assert "error: cannot reach http://127.0.0.1:9" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_model_is_said(tmp_path, server, capsys):
    words = ["serve", f"--base-url={server.url}", "--model=mine", f"--result-dir={tmp_path}"]
    assert main([*words, *SMALL]) == 2
    assert "has no model 'mine'; it has 'known'" in capsys.readouterr().err
    assert main(["serve", "--model=/nowhere/at/all", f"--result-dir={tmp_path}", *SMALL]) == 2
    assert "/nowhere/at/all" in capsys.readouterr().err


def test_an_unwritable_folder_is_said_before_anything_is_measured(tmp_path, server, capsys):
    (tmp_path / "file").touch()
    words = ["serve", f"--base-url={server.url}", f"--result-dir={tmp_path}/file/x", *SMALL]
    assert main(words) == 2
    assert f"cannot write results to {tmp_path}/file/x" in capsys.readouterr().err
    assert server.bodies == []


@pytest.mark.parametrize("words", [["--use-beam-search"], ["--lora-modules", "a"]])
def test_what_only_a_server_has_is_refused_in_process(tmp_path, capsys, words):
    assert main(["serve", f"--result-dir={tmp_path}", *SMALL, *words]) == 2
    assert f"{words[0]} is for a server: give its URL" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "said"), [
    (["--goodput", "ttft"], "--goodput wants NAME:VALUE"),
    (["--goodput", "speed:3"], "--goodput wants"),
    (["--metric-percentiles", "101"], "must be in [0, 100]"),
    (["--percentile-metrics", "x"], "unknown ['x']"),
    (["--burstiness", "0"], "burstiness must be positive"),
    (["--rounds", "-1"], "--rounds must be at least 1"),
    (["--extra-body", "{"], "--extra-body is no JSON"),
    (["--dataset-name", "x"], "unknown workload 'x'"),
    (["--backend", "kvjax"], "leave --base-url out"),
    (["--chat-template-kwargs", "[]"], "--chat-template-kwargs must be an object, got []"),
    (["--self-timed"], "needs a workload with time stamps"),
    (["--max-concurrency", "0"], "max_concurrency must be at least 1"),
])  # fmt: skip
def test_bad_flags_are_named(tmp_path, server, capsys, words, said):
    base = ["serve", f"--base-url={server.url}", f"--result-dir={tmp_path}", *SMALL]
    assert main([*base, *words]) == 2
    assert said in capsys.readouterr().err
