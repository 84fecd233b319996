import json
from pathlib import Path

import pytest

from kvjax.benchmarks import readme_serve, readme_tables
from kvjax.benchmarks.readme_tables import filled

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_says_what_the_results_say():
    text = README.read_text(encoding="utf-8")
    assert filled(text) == text, "run make readme-tables"
    for name in readme_tables.TABLES:
        assert f"<!-- table {name} -->\n|" in text


def test_a_changed_result_changes_the_table(tmp_path):
    row = {"target": "vllm", "dtype": "int8", "metric": "prefill_tps", "median": 1234.4}
    (tmp_path / "engine-1.json").write_text(json.dumps({"rows": [row]}))
    text = "a\n<!-- table engine-int8 -->\nold\n<!-- end -->\nb\n"
    made = filled(text, tmp_path)
    assert "| int8 | vLLM |\n|---|---:|\n| prefill, 512 tokens (tokens/s) | 1,234 |\n" in made
    assert made.startswith("a\n")
    assert made.endswith("<!-- end -->\nb\n")
    (tmp_path / "engine-2.json").write_text(json.dumps({"rows": [{**row, "median": 99.0}]}))
    assert "| 99 |" in filled(text, tmp_path)  # the newest counts


def test_a_table_that_nobody_makes_is_named():
    with pytest.raises(ValueError, match="unknown table 'x'; there are engine-bfloat16"):
        filled("<!-- table x -->\n<!-- end -->")


def served(p99, cached=None):
    return {"output_throughput": 10.4, "p99_ttft_ms": p99, "median_ttft_ms": 500.0,
            "median_tpot_ms": 20.0, "cache_hit_rate": cached}  # fmt: skip


def test_serving_beside_peers_has_a_row_per_workload_and_figure(tmp_path):
    run = {**served(1234.0, 0.5), "backend": "kvjax", "manifest": {"workload": {"name": "rag"}},
           "peers": {"vllm": served(2345.0)}}  # fmt: skip
    (tmp_path / "serve-rag-20260101-000000.json").write_text(json.dumps(run))
    (tmp_path / "serve-x-20260101-000000.json").write_text(json.dumps({**run, "peers": {}}))
    made = readme_serve.serving(tmp_path)
    assert made.splitlines()[0] == "| | kvjax | vLLM |"
    assert "| rag: first token, P99 (s) | 1.23 | 2.35 |\n" in made
    assert "| rag: prompt tokens cached (%) | 50 |  |\n" in made
    newer = {**run, **served(3000.0)}
    (tmp_path / "serve-rag-20260102-000000.json").write_text(json.dumps(newer))
    assert "| rag: first token, P99 (s) | 3.00 | 2.35 |\n" in readme_serve.serving(tmp_path)


def test_kvjax_s_own_commands_have_a_row_each(tmp_path):
    sizes = {"batch_size": 8, "input_len": 32, "output_len": 128}
    run = {"manifest": {"sizes": sizes}, "avg_latency": 2.0, "std_latency": 0.1,
           "share_of_compute": 0.25, "share_of_bandwidth": 0.5, "padding_waste": 0.125,
           "peak_rss_mib": 1000.4}  # fmt: skip
    (tmp_path / "latency-20260101-000000.json").write_text(json.dumps(run))
    times = {"cold_first_token_times": [17.0, 18.0], "warm_first_token_times": []}
    (tmp_path / "startup-1.json").write_text(json.dumps({**times, "peak_rss_mib": 700.0}))
    made = readme_serve.offline(tmp_path)
    row = "| `latency` | batch 8, 32 + 128 tokens: 2.00 s ± 0.10 | 0.25 | 0.50 | 0.12 | 1,000 |\n"
    assert row in made
    assert "| `startup` | first token after 17.5 s with nothing compiled before |" in made
