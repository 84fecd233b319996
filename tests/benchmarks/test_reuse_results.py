import json

import pytest

from kvjax.benchmarks import reuse_reading, reuse_results
from kvjax.benchmarks.corpora import Generation
from kvjax.benchmarks.reuse_results import ResultFile
from tests.benchmarks.readings import reading

SETTINGS = {"split": "held_out", "size": "small", "seed": 0, "about": {"model": "m", "dtype": "f"}}
KEY = ("lookup", "lookup-0", "naive")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "run.jsonl"


def opened(path, **how):
    return ResultFile(path, SETTINGS, {"commit": "abc"}, **how)


def test_what_is_added_is_read_back(path):
    kept = reading(0.25, solved=None, gold_logprob=None, extra={"jaccard": 0.5})
    with opened(path) as file:
        file.add(KEY, kept)
        file.fail(("lookup", "lookup-1", "naive"), ValueError("no"))
        file.keep(["p"], [Generation("text", (1, 2))])
        file.note("corpus lookup", "digest")
    found = reuse_results.read(path)
    assert found.readings == {KEY: kept}
    assert found.errors == {("lookup", "lookup-1", "naive"): "ValueError: no"}
    assert found.generations == {"p": Generation("text", (1, 2))}
    assert found.manifest == {"version": 1, "commit": "abc", "corpus lookup": "digest", **SETTINGS}


def test_every_reading_is_in_the_file_before_the_next_is_measured(path):
    with opened(path) as file:
        for count in range(3):
            assert len(reuse_results.read(path).readings) == count
            file.add(("lookup", str(count), "naive"), reading())


def test_a_file_cut_anywhere_is_continued_without_its_torn_line(path):
    with opened(path) as file:
        file.add(KEY, reading())
        before = path.stat().st_size
        file.add(("lookup", "lookup-1", "naive"), reading())
    whole = path.read_bytes()
    for length in (before, before + 1, len(whole) - 1):
        path.write_bytes(whole[:length])
        with opened(path, resume=True) as file:
            assert set(file.results.readings) == {KEY}
            assert path.read_bytes() == whole[:before]


def test_a_file_cut_in_its_first_line_starts_over(path):
    with opened(path):
        pass
    whole = path.read_bytes()
    path.write_bytes(whole[:10])
    with opened(path, resume=True):
        pass
    assert path.read_bytes() == whole


def test_a_failure_is_replaced_by_a_later_reading_and_not_the_other_way_round(path):
    with opened(path) as file:
        file.fail(KEY, ValueError("no"))
        file.add(KEY, reading())
    found = reuse_results.read(path)
    assert (set(found.readings), found.errors) == ({KEY}, {})


def test_an_existing_file_is_not_touched_without_resume(path):
    with opened(path) as file:
        file.add(KEY, reading())
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="--resume"):
        opened(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(("name", "value"), [("seed", 1), ("about", {"model": "other"})])
def test_a_run_of_other_settings_is_not_continued(path, name, value):
    with opened(path):
        pass
    with pytest.raises(ValueError, match=f"with {name}"):
        ResultFile(path, {**SETTINGS, name: value}, {}, resume=True)


def test_a_corpus_that_has_changed_is_noticed(path):
    with opened(path) as file:
        file.note("corpus lookup", "digest")
    with opened(path, resume=True) as file:
        file.note("corpus lookup", "digest")
        with pytest.raises(ValueError, match="another corpus lookup"):
            file.note("corpus lookup", "other")


def test_two_runs_cannot_write_one_file(path):
    with opened(path), pytest.raises(ValueError, match="another run"):
        opened(path, resume=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{\n", "no JSON"),
        ("[]\n", "no object"),
        ('{"a": 1}\n', "no line of a reuse result"),
        ('{"manifest": {"version": 9}}\n', "version 9"),
        ("", "no manifest"),
        ('{"manifest": {"version": 1}}\n{"corpus": "c", "item": "i", "method": "m", '
         '"reading": {}}\n', ":2 is no line"),
    ],
)  # fmt: skip
def test_what_is_no_result_file_is_named_by_line(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        reuse_results.read(path)


def test_pairs_are_over_the_items_that_all_methods_have(path):
    with opened(path) as file:
        for item, method, kl in [("1", "a", 1), ("2", "a", 2), ("3", "a", 3), ("3", "b", 30),
                                 ("2", "b", 20)]:  # fmt: skip
            file.add(("lookup", item, method), reading(kl))
    results = reuse_results.read(path)
    columns = [("a", lambda r: r.kl_1), ("b", lambda r: r.kl_1)]
    assert results.paired("lookup", columns) == [[2, 3], [20, 30]]
    assert results.paired("binding", columns) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_1": float("nan")}, "kl_1"),
        ({"kl_answer": -1.0}, "kl_answer"),
        ({"kv_deviation": ()}, "per layer"),
        ({"extra": {"x": float("inf")}}, "not finite"),
        ({"computed_layer_tokens": 301}, r"in \[0, 300\], got 301"),
    ],
)
def test_a_reading_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        reading(**changes)


def test_a_reading_survives_json():
    kept = reading(0.1, extra={"jaccard": 0.25})
    assert reuse_reading.from_json(json.loads(json.dumps(kept.as_json()))) == kept
    with pytest.raises(ValueError, match="no reading"):
        reuse_reading.from_json({**kept.as_json(), "speed": 1})
