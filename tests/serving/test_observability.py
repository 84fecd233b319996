"""Spans, dashboards and page times: what operators look at is there, and true."""

import http.server
import itertools
import json
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from kvjax.cache.pool import PagePool
from kvjax.cache.radix import RadixTree
from kvjax.serving.gate import JSONFormatter
from kvjax.serving.metrics import Metrics, PageTimes
from tests.serving.live_server import serving, until

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """An OTLP receiver: its address, and the spans that it got."""
    spans: list[Any] = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
    server.shutdown()
    server.server_close()


def test_a_request_leaves_a_span_with_its_phases_in_the_clients_trace(tiny_path, collector):
    address, spans = collector
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with serving(tiny_path, otlp_endpoint=address) as client:
        body = {"prompt": "abc", "max_tokens": 5, "ignore_eos": True}
        headers = {"traceparent": f"00-{trace}-{parent}-01"}
        assert client.post("/v1/completions", body, **headers)[0] == 200
    by_name = {span.name: span for span in spans}
    assert set(by_name) == {"llm_request", "queue", "prefill", "decode"}
    whole = by_name["llm_request"]
    assert whole.trace_id.hex() == trace
    assert whole.parent_span_id.hex() == parent
    attributes = {a.key: a.value for a in whole.attributes}
    assert attributes["gen_ai.usage.output_tokens"].int_value == 5
    assert attributes["gen_ai.usage.input_tokens"].int_value == 3
    phases = [by_name[name] for name in ("queue", "prefill", "decode")]
    assert all(phase.parent_span_id == whole.span_id for phase in phases)
    assert phases[0].start_time_unix_nano == whole.start_time_unix_nano
    assert phases[-1].end_time_unix_nano == whole.end_time_unix_nano
    for before, after in itertools.pairwise(phases):
        assert before.end_time_unix_nano == after.start_time_unix_nano


def test_a_line_of_the_log_is_json_with_the_id_of_its_request(served, caplog):
    with caplog.at_level(logging.INFO, "kvjax.serving.access"):
        body = {"prompt": "abc", "max_tokens": 1}
        assert served.post("/v1/completions", body, **{"X-Request-Id": "mine-1"})[0] == 200
        until(lambda: any("/v1/completions" in text for text in caplog.messages))
    (record,) = (r for r in caplog.records if "/v1/completions" in r.getMessage())
    line = json.loads(JSONFormatter().format(record))
    assert (line["request_id"], line["status"], line["method"]) == ("mine-1", 200, "POST")
    assert line["path"] == "/v1/completions"
    assert line["seconds"] > 0


def test_every_metric_of_the_dashboard_is_exported(served):
    text = served.request("GET", "/metrics").read().decode()
    exported = set(re.findall(r"^(?:# TYPE )?(kvjax:\w+)", text, re.MULTILINE))
    exported |= {f"{name}_bucket" for name in exported} | {f"{name}_total" for name in exported}
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"kvjax:\w+", target["expr"])
    }
    assert len(asked) >= 15
    assert asked <= exported


def test_page_times_are_those_of_the_clock():
    now = [0.0]
    metrics, pool = Metrics(), PagePool(8, 4)
    tree = RadixTree(pool)
    tree.observers.append(PageTimes(metrics, lambda: now[0]))
    pages = pool.allocate(2)
    tree.insert("x", range(8), pages)
    pool.release(pages)
    for now[0] in (3.0, 10.0):
        assert tree.match("x", list(range(8))).num_tokens == 8
    now[0] = 40.0
    assert tree.evict(1) == 1

    def total(name: str) -> tuple[float, float]:
        text = metrics.text().decode()
        sums = re.search(rf"^kvjax:{name}_seconds_sum (\S+)", text, re.MULTILINE)
        counts = re.search(rf"^kvjax:{name}_seconds_count (\S+)", text, re.MULTILINE)
        assert sums is not None
        assert counts is not None
        return float(counts[1]), float(sums[1])

    assert total("kv_block_reuse_gap") == (4, 2 * (3.0 + 7.0))
    assert total("kv_block_lifetime") == (1, 40.0)
    assert total("kv_block_idle_before_evict") == (1, 30.0)
