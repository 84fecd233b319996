"""`kvjax bench http`: a real server and a real engine, on a small scale."""

import json

from kvjax.benchmarks import http
from kvjax.benchmarks.__main__ import main
from tests.benchmarks.result_schema import complaints
from tests.tiny_checkpoint import write_tiny_checkpoint


def test_it_measures_both_sides_and_writes_every_round(tmp_path, monkeypatch, capsys):
    for name, value in (
        ("_STREAMS", 2),
        ("_PROMPT", 16),
        ("_OUTPUT", 8),
        ("_CONTEXT", 256),
        ("_STEP", 32),
    ):
        monkeypatch.setattr(http, name, value)
    monkeypatch.setattr(http, "_LENGTHS", (8, 16))
    model, out = write_tiny_checkpoint(tmp_path / "tiny"), tmp_path / "out.json"
    words = ["http", "--model", str(model), "--dtype=float32", "--rounds=2", "--out", str(out)]
    assert main(words) == 0
    record = json.loads(out.read_text())
    assert len(record["throughput"]["rounds"]) == 2
    assert all(rate > 0 for pair in record["throughput"]["rounds"] for rate in pair)
    assert len(record["first_token"]["differences"]) == 2 * 2 * http._REPEATS
    assert complaints(record) == []
    told = capsys.readouterr().out
    assert "2 streams" in told
    assert "first token" in told
