"""The loop, its file and its table, with an instrument of known readings in place of a model."""

import argparse
import json

import pytest

from kvjax.benchmarks import corpora, reuse, reuse_methods, reuse_results
from kvjax.benchmarks.corpora import Generation
from tests.benchmarks.readings import reading

KNOWN = {"full": 0.0, "naive": 1.0, "naive_no_rotation": 2.0, "random:ratio=0.15": 0.9,
         "epic:k=16": 0.5, "cacheblend:ratio=0.15": 0.25, "kvcomm:anchors=20": 0.8,
         "cachecraft:ratio=0.15": 0.4}  # fmt: skip


class Instrument:
    """Readings that are known beforehand; stops, as if interrupted, after `patience` of them."""

    def __init__(self, patience=None, broken=()):
        self.asked, self.begun, self.prompts = [], [], []
        self.patience, self.broken = patience, broken

    def about(self):
        return {"model": "none", "dtype": "float32"}

    def generate(self, prompts, max_tokens):
        self.prompts += prompts
        return [Generation(f"{p[-9:]} {len(p)}", (len(p), max_tokens)) for p in prompts]

    def learns(self, method):
        return method.startswith(("kvcomm", "cachecraft"))

    def begin(self, corpus, methods):
        self.begun.append((corpus.name, tuple(methods)))

    def measure(self, item, method):
        if self.patience is not None and len(self.asked) >= self.patience:
            raise KeyboardInterrupt
        self.asked.append((item.corpus, item.id, method))
        if method in self.broken:
            raise NotImplementedError("no such thing")
        return reading(KNOWN[method])


def run(path, instrument, *words):
    parser = argparse.ArgumentParser()
    reuse.add_arguments(parser)
    args = parser.parse_args(["--output", str(path), *words])
    return reuse.run(args, lambda _args: instrument)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.jsonl"


SMALL = ("--quick", "--items", "3", "--corpora", "lookup", "binding")


def test_every_item_is_measured_under_every_method_in_a_row_full_first(path):
    instrument = Instrument()
    assert run(path, instrument, *SMALL) == 0
    assert len(instrument.asked) == 2 * 3 * len(reuse_methods.QUICK)
    for at in range(0, len(instrument.asked), len(reuse_methods.QUICK)):
        block = instrument.asked[at : at + len(reuse_methods.QUICK)]
        assert len({item for _, item, _ in block}) == 1
        assert [method for *_, method in block] == list(reuse_methods.QUICK)


@pytest.mark.parametrize("patience", [0, 1, 7, 20, 35])
def test_an_interrupted_run_continues_and_measures_nothing_twice(path, tmp_path, capsys, patience):
    first, second = Instrument(patience), Instrument()
    with pytest.raises(KeyboardInterrupt):
        run(path, first, *SMALL)
    assert run(path, second, *SMALL, "--resume") == 0
    capsys.readouterr()
    assert len(first.asked) == patience
    both = first.asked + second.asked
    assert len(set(both)) == len(both) == 36
    whole = tmp_path / "whole.jsonl"
    assert run(whole, Instrument(), *SMALL) == 0
    assert reuse_results.read(path).readings == reuse_results.read(whole).readings


def test_a_complete_run_loads_no_stores_again(path):
    run(path, Instrument(), *SMALL)
    again = Instrument()
    assert run(path, again, *SMALL, "--resume") == 0
    assert (again.asked, again.begun) == ([], [])


def test_a_resumed_run_may_ask_for_more_methods_items_and_corpora(path):
    run(path, Instrument(), "--corpora", "lookup", "--items", "2", "--methods", "full", "naive")
    more = Instrument()
    words = ("--items", "3", "--methods", "full", "naive", "epic:k=16", "--corpora", "lookup")
    assert run(path, more, *words, "schema", "--resume") == 0
    assert len(more.asked) == (3 * 3 - 2 * 2) + 3 * 3
    assert more.begun[1] == ("schema", ("full", "naive", "epic:k=16"))


def test_the_table_is_printed_and_written_beside_the_result(path, capsys):
    run(path, Instrument(), *SMALL)
    shown = capsys.readouterr().out
    assert path.with_suffix(".md").read_text() == shown
    assert "### C1, lookup: 3 items" in shown
    assert "| CacheBlend 15 % | 0.2500 | 0.2500 | 75.0 | " in shown
    assert "| re-rotation beats wrong positions | all | binding |" in shown
    run(path, Instrument(), "--table")
    assert capsys.readouterr().out == shown


def test_a_method_that_fails_is_an_error_of_its_own_and_is_tried_again(path, capsys):
    broken = Instrument(broken=("epic:k=16",))
    assert run(path, broken, *SMALL) == 1
    assert "NotImplementedError: no such thing" in capsys.readouterr().out
    mended = Instrument()
    assert run(path, mended, *SMALL, "--resume") == 0
    assert {method for *_, method in mended.asked} == {"epic:k=16"}
    assert len(mended.asked) == 6


def test_messages_are_generated_once_and_kept_over_an_interruption(path):
    words = ("--quick", "--items", "2", "--corpora", "agents", "relay")
    first, second = Instrument(3), Instrument()
    with pytest.raises(KeyboardInterrupt):
        run(path, first, *words)
    run(path, second, *words, "--resume")
    assert len(set(first.prompts)) == len(first.prompts) > 0
    assert second.prompts == []


def test_a_method_that_learns_has_a_pass_over_a_corpus_to_itself(path):
    instrument = Instrument()
    methods = ("full", "naive", "kvcomm:anchors=20", "cachecraft:ratio=0.15")
    run(path, instrument, "--items", "2", "--corpora", "agents", "--methods", *methods)
    assert sorted(instrument.begun) == sorted(
        ("agents", some) for some in (methods[:2], methods[2:3], methods[3:])
    )
    assert len(instrument.asked) == 2 * len(methods)


def test_another_model_cannot_continue_a_run(path):
    run(path, Instrument(), *SMALL)
    other = Instrument()
    other.about = lambda: {"model": "other"}
    with pytest.raises(ValueError, match="measured with about"):
        run(path, other, *SMALL, "--resume")


def test_methods_for_agents_are_only_measured_there(path):
    specs = reuse_methods.default(["lookup"])
    assert "relaycaching" not in specs
    assert "relaycaching" in reuse_methods.default(["agents", "lookup"])
    assert not reuse_methods.applies("kvcomm:anchors=3", "lookup")
    assert reuse_methods.applies("tablecache", "sql")


def test_the_default_is_every_corpus_of_the_split():
    parser = argparse.ArgumentParser()
    reuse.add_arguments(parser)
    names, specs, count = reuse.chosen(parser.parse_args([]))
    assert names == list(corpora.CORPORA)
    assert specs == [method.spec for method in reuse_methods.METHODS]
    assert count is None
    names, _, _ = reuse.chosen(parser.parse_args(["--split", "tuning"]))
    assert names == ["lookup", "binding", "agents", "schema"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "cacheblnd:ratio=0.1"], "meant 'cacheblend'.*; there are full, prefix"),
        (["--methods", "epic:16"], "expected epic:option=value"),
        (["--corpora", "lokup"], "unknown corpus 'lokup'; there are lookup"),
        (["--corpora", "rag", "--split", "tuning"], "rag has no split tuning"),
        (["--items", "0"], "at least 1, got 0"),
    ],
)
def test_wrong_names_are_refused_with_the_list_before_anything_is_opened(path, words, message):
    def opened(args):
        raise AssertionError("opened")

    parser = argparse.ArgumentParser()
    reuse.add_arguments(parser)
    with pytest.raises(ValueError, match=message):
        reuse.run(parser.parse_args(["--output", str(path), *words]), opened)
    assert not path.exists()


def test_a_result_is_not_replaced_without_asking(path):
    run(path, Instrument(), *SMALL)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="--resume"):
        run(path, Instrument(), *SMALL)
    assert path.read_bytes() == before


def test_specs_come_in_the_order_of_the_table_and_once():
    found = reuse_methods.check(["epic:k=8", "naive", "full", "naive"])
    assert found == ["full", "naive", "epic:k=8"]


def test_a_line_of_the_file_is_one_json_object_per_measurement(path):
    run(path, Instrument(), *SMALL)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert "manifest" in lines[0]
    assert sum("reading" in line for line in lines) == 36
