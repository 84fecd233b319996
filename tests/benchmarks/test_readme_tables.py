import json
from pathlib import Path

import pytest

from kvjax.benchmarks import readme_tables
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
