import pytest

from kvjax.benchmarks import results
from kvjax.benchmarks.__main__ import main
from kvjax.benchmarks.results import Results


@pytest.fixture
def saved(tmp_path):
    machine = {"cpu": "Some CPU"}
    about = {"commit": "abc", "started": "now", "machine": machine, "threads": 2, "rounds": 3}
    out = Results(tmp_path / "run.json", about)
    for value in (100.0, 300.0, 200.0):
        out.add("kvjax", "float32", "prefill_tps", value)
    out.add("kvjax", "float32", "ttft_warm_s", 0.125)
    out.add("peer", "float32", "prefill_tps", 50.0)
    out.add("peer", "bfloat16", "prefill_tps", 70.0)
    out.fail("absent", "float32", "load", None, "no environment")
    out.status = "complete"
    out.save()
    return tmp_path / "run.json"


def test_rows_keep_raw_values_beside_median_and_range(saved):
    row = results.read(saved)["rows"][0]
    assert row["values"] == [100.0, 300.0, 200.0]
    assert (row["median"], row["min"], row["max"]) == (200.0, 100.0, 300.0)
    assert (row["unit"], row["higher_is_better"]) == ("tokens/s", True)


def test_markdown_has_a_table_per_dtype_the_errors_and_the_provenance(saved):
    text = results.markdown(results.read(saved))
    assert "| float32 | prefill (tokens/s) | first token, warm prefix (s) |" in text
    assert "| kvjax | 200 (100-300) | 0.125 |" in text
    assert "| peer | 50 | - |" in text
    assert "| absent | - | - |" in text
    assert "| bfloat16 | prefill (tokens/s) |" in text
    assert "- absent float32 load: no environment" in text
    assert "Commit abc, now, Some CPU, 2 threads, 3 rounds" in text


def test_every_line_of_a_markdown_table_has_the_same_number_of_cells(saved):
    blocks = results.markdown(results.read(saved)).split("\n\n")
    for block in blocks:
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_the_terminal_tables_have_a_column_per_target(saved):
    first, second = results.tables(results.read(saved))
    assert [column.header for column in first.columns] == ["metric", "kvjax", "peer", "absent"]
    assert [column.header for column in second.columns] == ["metric", "peer"]


@pytest.mark.parametrize("flags", [[], ["--terminal"]])
def test_the_table_command_prints_the_run(saved, capsys, flags):
    assert main(["table", str(saved), *flags]) == 0
    assert "200 (100-300)" in capsys.readouterr().out


def test_a_file_that_is_no_result_is_an_error_and_not_a_traceback(tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text("{}")
    assert main(["table", str(path)]) == 2
    assert "no benchmark result" in capsys.readouterr().err
