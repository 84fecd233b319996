"""Approximate reuse serves a model that was measured to bear it, and no other."""

import json
from pathlib import Path

import pytest

from kvjax import LLM, SamplingParams
from kvjax.benchmarks.reuse_reading import Reading
from kvjax.build import enable_compilation_cache
from kvjax.build import verdicts as verdicts_of
from kvjax.cli import main
from kvjax.cli.reuse import agreements
from kvjax.config import EngineConfig, cache_dir
from kvjax.errors import ReuseRefused
from kvjax.request import Chunk
from kvjax.reuse import parse
from kvjax.reuse.gate import Gate, Limits, Verdict, Verdicts
from tests.tiny_checkpoint import write_tiny_checkpoint

EPIC = parse("epic:k=4")
MARKED = ["begin ", Chunk("the first chunk. "), Chunk("the second. "), "which?"]
SIZES = {"dtype": "float32", "max_num_seqs": 2, "max_num_batched_tokens": 32}


def verdict(loss: float, agreement: float = 1.0) -> Verdict:
    return Verdict(
        strategy=EPIC.spec, loss=loss, loss_interval=(loss / 2, 2 * loss), recovery=0.5,
        agreement=agreement, agreement_interval=(agreement / 2, agreement),
        agreement_of="3 right answers",
        corpus="binding", corpus_digest="d", items=3, about={"device": "cpu"},
    )  # fmt: skip


def verdicts(
    folder: Path,
    fingerprint: str = "f" * 32,
    dtype: str = "float32",
    kv_dtype: str = "float32",
    length: int | None = None,
) -> Verdicts:
    return Verdicts(folder, lambda: fingerprint, dtype, kv_dtype, length)


def limits(max_loss: float, min_agreement: float = 0.9) -> Limits:
    return Limits(max_loss, min_agreement)


def test_a_verdict_is_read_back_as_it_was_written(tmp_path):
    store = verdicts(tmp_path)
    assert store.read(EPIC) is None
    path = store.write(EPIC, verdict(0.5))
    store.write(EPIC, verdict(0.04))
    assert store.read(EPIC) == verdict(0.04)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_what_was_not_measured_is_refused_and_the_message_says_how_to_measure(tmp_path):
    with pytest.raises(ReuseRefused, match=r"not measured.*kvjax reuse check MODEL --reuse epic:k"):
        Gate(verdicts(tmp_path), limits(0.1)).check(EPIC)


def test_a_loss_above_the_limit_is_refused_with_both_numbers_and_one_at_the_limit_serves(tmp_path):
    store = verdicts(tmp_path)
    store.write(EPIC, verdict(0.04))
    with pytest.raises(ReuseRefused, match=r"loses 0\.0400 nats .* max_reuse_loss=0\.039"):
        Gate(store, limits(0.039)).check(EPIC)
    gate = Gate(store, limits(0.04))
    gate.check(EPIC)
    assert gate.loss(EPIC) == 0.04


def test_a_small_loss_does_not_excuse_lost_answers(tmp_path):
    store = verdicts(tmp_path)
    store.write(EPIC, verdict(0.01, agreement=0.17))
    with pytest.raises(ReuseRefused, match=r"keeps 17\.0% of .*3 right answers.*agreement=0\.18"):
        Gate(store, limits(0.1, 0.18)).check(EPIC)
    Gate(store, limits(0.1, 0.17)).check(EPIC)


def reading(solved: bool | None, agreement: float) -> Reading:
    return Reading(
        kl_1=0.1, kl_answer=0.1, top1=True, agreement=agreement, solved=solved, gold_logprob=None,
        kv_deviation=(0.1,), computed_layer_tokens=1, total_layer_tokens=2, copied_tokens=1,
        stored_bytes_per_token=1.0, prefill_s=0.1,
    )  # fmt: skip


def test_agreement_is_of_the_answers_that_full_prefill_has_right():
    full = [reading(solved, 1.0) for solved in (True, True, False, True, True)]
    other = [reading(solved, 0.25) for solved in (True, False, True, True, False)]
    assert agreements(full, other) == ([1.0, 0.0, 1.0, 0.0], "4 right answers")
    few = [reading(solved, 1.0) for solved in (True, True, False, True, None)]
    assert agreements(few, other) == ([0.25] * 5, "5 answers, by token")


def test_what_breaks_both_limits_is_told_both(tmp_path):
    store = verdicts(tmp_path)
    store.write(EPIC, verdict(0.2, agreement=0.5))
    both = r"binding, 3 items.* loses 0\.2000 .*max_reuse_loss=0\.1, and keeps 50\.0% .*=0\.9"
    with pytest.raises(ReuseRefused, match=both):
        Gate(store, limits(0.1)).check(EPIC)


@pytest.mark.parametrize(
    "other",
    [
        {"fingerprint": "e" * 32},
        {"dtype": "int8"},
        {"kv_dtype": "int8"},
        {"length": 4096},
        {"strategy": parse("epic:k=5")},
        {"strategy": parse("naive")},
    ],
    ids=str,
)
def test_a_verdict_is_about_one_model_its_types_and_a_strategy_with_its_options(tmp_path, other):
    verdicts(tmp_path).write(EPIC, verdict(0.0))
    strategy = other.pop("strategy", EPIC)
    with pytest.raises(ReuseRefused, match="not measured"):
        Gate(verdicts(tmp_path, **other), limits(0.1)).check(strategy)


def test_exact_reuse_is_let_through_without_a_look_at_the_weights():
    def unread() -> str:
        raise AssertionError("the fingerprint reads the weights")

    gate = Gate(Verdicts(Path("nowhere"), unread, "float32", "float32"), limits(0.0))
    gate.check(parse(None))
    assert gate.loss(parse(None)) is None


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"loss": NaN}', "null"])
def test_a_damaged_verdict_is_refused_and_can_be_forced_or_measured_again(tmp_path, text):
    store = verdicts(tmp_path)
    path = store.write(EPIC, verdict(0.0))
    path.write_text(text)
    with pytest.raises(ReuseRefused, match="is no verdict"):
        Gate(store, limits(0.1)).check(EPIC)
    Gate(store, limits(0.1), forced=True).check(EPIC)
    store.write(EPIC, verdict(0.0))
    Gate(store, limits(0.1)).check(EPIC)


@pytest.mark.parametrize("loss", [-1.0, float("nan"), float("inf")])
def test_what_is_no_loss_makes_no_verdict(loss):
    with pytest.raises(ValueError, match="a loss must be finite"):
        verdict(loss)


@pytest.mark.parametrize("agreement", [-0.1, 1.1, float("nan")])
def test_what_is_no_share_makes_no_verdict(agreement):
    with pytest.raises(ValueError, match=r"an agreement must be in \[0, 1\]"):
        verdict(0.0, agreement)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return write_tiny_checkpoint(folder, max_position_embeddings=8192)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache folder without verdicts, in which what was compiled before is compiled."""
    enable_compilation_cache()
    compiled = cache_dir() / "native"
    compiled.mkdir(parents=True, exist_ok=True)
    (tmp_path / "native").symlink_to(compiled)
    monkeypatch.setenv("KVJAX_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_an_engine_refuses_before_any_work_unless_it_is_forced(model, cache):
    llm = LLM(model, **SIZES)
    params = SamplingParams(reuse="epic:k=4", max_tokens=2)
    with pytest.raises(ReuseRefused, match="not measured"):
        llm.generate([MARKED], params)
    with pytest.raises(ReuseRefused, match="not measured"):
        llm.open(MARKED, params)
    assert not llm.engine.has_work
    with pytest.raises(ReuseRefused, match="not measured"):
        LLM(model, reuse="epic:k=4", **SIZES)
    forced = LLM(model, reuse="epic:k=4", force_reuse=True, **SIZES)
    (out,) = forced.generate([MARKED], SamplingParams(max_tokens=2))
    assert out.reuse.copied_tokens > 0
    assert out.reuse.estimated_loss is None


def test_a_report_has_the_loss_that_was_measured(model, cache):
    llm = LLM(model, **SIZES)
    verdicts_of(llm.checkpoint, llm.engine.config).write(EPIC, verdict(0.03))
    params = SamplingParams(reuse="epic:k=4", max_tokens=2)
    (out,) = llm.generate([MARKED], params)
    assert out.reuse.estimated_loss == 0.03
    llm.reset_prefix_cache()
    with llm.open(MARKED, params) as branch:
        assert branch.reuse is not None
        assert branch.reuse.estimated_loss == 0.03


@pytest.mark.slow
def test_check_measures_keeps_its_verdict_and_says_by_its_status_who_may_serve(
    model, cache, capsys
):
    words = ["reuse", "check", str(model), "--reuse", "epic:k=4", "--items", "2", "-q",
             "--dtype", "float32", "--max-num-seqs", "2"]  # fmt: skip
    assert main([*words, "--max-reuse-loss", "1000", "--min-reuse-agreement", "0"]) == 0
    assert "yes" in capsys.readouterr().out
    (path,) = (cache / "reuse").rglob("*.json")
    kept = json.loads(path.read_text())
    assert (kept["strategy"], kept["corpus"], kept["items"]) == ("epic:k=4", "binding", 2)
    assert kept["loss_interval"][0] <= kept["loss"] <= kept["loss_interval"][1]
    assert kept["loss"] > 0
    low, high = kept["agreement_interval"]
    assert 0 <= low <= kept["agreement"] <= high < 1
    most, least = kept["loss"], kept["agreement"]
    llm = LLM(model, max_reuse_loss=most, min_reuse_agreement=least, **SIZES)
    llm.generate([MARKED], SamplingParams(reuse="epic:k=4", max_tokens=2))
    for stricter, says in (
        ({"max_reuse_loss": most / 2, "min_reuse_agreement": least}, r"loses \d"),
        (
            {"max_reuse_loss": most, "min_reuse_agreement": 1.0},
            "of full prefill's 2 answers, by token",
        ),
    ):
        llm = LLM(model, **stricter, **SIZES)
        with pytest.raises(ReuseRefused, match=says):
            llm.generate([MARKED], SamplingParams(reuse="epic:k=4", max_tokens=2))


def test_check_refuses_what_there_is_nothing_to_measure_of(model, cache, capsys):
    for words, says in (
        (["--reuse", "prefix"], "prefix is exact"),
        (["--reuse", "nonsense"], "no reuse strategy 'nonsense'"),
        (["--items", "0"], "--items must be at least 1"),
    ):
        assert main(["reuse", "check", str(model), *words]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("share", [1.1, -0.1, True, "0.5"])
def test_a_limit_that_is_no_share_is_refused(share):
    with pytest.raises(ValueError, match=r"min_reuse_agreement must be a number in \[0, 1\]"):
        EngineConfig(min_reuse_agreement=share)
