import dataclasses
import inspect
import json

import jax
import pytest

from kvjax.benchmarks import kernel_cases, kernel_peers, kernel_tuning, kernels
from kvjax.benchmarks.kernel_cases import Case, Heads, Sizes, Subject
from kvjax.pallas_kernels import OPERATIONS, PackedPages, packs, tuning
from kvjax.pallas_kernels.attention_mass import gpu as mass  # noqa: F401  (its rule)
from kvjax.pallas_kernels.paged_attention import gpu_blocks, tpu  # noqa: F401  (their rules)
from tests.benchmarks.result_schema import complaints

needs_compiler = pytest.mark.skipif(
    jax.default_backend() != "cpu" or not packs(), reason="no C++ kernel runs here"
)
TINY = Sizes(
    Heads(2, 1, 64), 16, (1, 2), (64,), (32,), (2, 32, 16), 64, 64, (2, 64), 2**16, 64
)  # fmt: skip


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(kernels.Timer, "least", 1e-4)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "kernels.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.Timer, "least", 1e-4)
        kernels.measure(list(kernel_cases.cases(TINY, "float32")), TINY, "float32", 2, out)
    return json.loads(out.read_text())


def test_every_case_gives_a_row_of_ours_with_its_shares_of_the_ceilings(record):
    assert not record["errors"]
    assert complaints(record) == []
    assert record["status"] == "complete"
    names = [c.name for c in kernel_cases.cases(TINY, "float32")]
    ours = [r for r in record["rows"] if r["subject"].startswith("kvjax")]
    twice = names.index("recompute 15 %")
    names.insert(twice, names[twice])
    assert [r["case"] for r in ours if r["subject"] != "kvjax without"] == names
    for row in ours:
        assert len(row["seconds"]) == 2
        assert row["bytes"] > 0
        share = row["bytes"] / row["median"] / record["ceilings"]["copy"]
        assert row["share_of_copy"] == pytest.approx(share)
        assert "ms" in kernels.line(row)


def test_a_result_names_device_versions_and_backends(record):
    assert record["device"]["kind"] == jax.devices()[0].device_kind
    assert record["device"]["versions"]["jax"] == jax.__version__
    assert "chosen" in record["device"]["backends"]["paged_attention"].values()


def test_what_was_not_compared_has_a_reason(record):
    told = {r["subject"]: r["why"] for r in record["not_compared"]}
    assert "cuDNN needs a GPU" in told["jax.nn, cuDNN"]
    compared = {r["subject"] for r in record["rows"]}
    assert {"jax.nn, XLA", "contiguous, XLA"} <= compared
    assert set(kernel_peers.PEERS) <= compared | set(told)


def test_costs_are_those_of_the_task():
    decode = kernel_cases.decode(TINY, "float32", 2, 64)
    assert decode.flops == 4 * 2 * 64 * 2 * 64
    assert decode.bytes == 2 * 64 * 4 * 2 * 64 + 2 * 2 * 64 * 8
    prefill = kernel_cases.prefill(TINY, "float32", 32)
    assert prefill.flops == 4 * 2 * 64 * (32 * 33 // 2)
    cascade, without = kernel_cases.shared_prefix(TINY, "float32")
    read = 2 * 64 * 4  # per key
    again = 0 if jax.default_backend() == "cpu" else read * 32  # the prefix, once more per request
    assert without.bytes - cascade.bytes == again


def test_an_error_is_a_row_of_its_own_and_the_file_keeps_what_came_before(tmp_path):
    def broken() -> list[Subject]:
        raise RuntimeError("no such kernel")

    first = next(kernel_cases.cases(TINY, "float32"))
    out = tmp_path / "x.json"
    record = kernels.measure([first, Case("bad", {}, broken)], TINY, "float32", 1, out)
    assert json.loads(out.read_text()) == record
    assert len(record["rows"]) == 1
    assert record["errors"] == [{"case": "bad", "error": "RuntimeError: no such kernel"}]


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Tables of a device kind in a folder of the test's own, and a rule."""
    monkeypatch.setattr(tuning, "_path", lambda operation, kind: tmp_path / f"{operation}.json")
    monkeypatch.setitem(tuning.RULES, "op/kernel", lambda *, width: {"block": width})
    tuning._table.cache_clear()
    yield tmp_path
    tuning._table.cache_clear()


def test_recorded_sizes_replace_the_rule_for_the_same_facts_only(tables):
    assert tuning.block_sizes("op/kernel", width=64) == {"block": 64}
    (tables / "op").mkdir()
    tuning.record("op/kernel", {"width": 64}, {"block": 32})
    tuning.record("op/kernel", {"width": 64}, {"block": 16})
    assert tuning.block_sizes("op/kernel", width=64) == {"block": 16}
    assert tuning.block_sizes("op/kernel", width=128) == {"block": 128}


def test_tried_sizes_win_until_they_are_taken_back(tables):
    tuning.try_sizes("op/kernel", {"block": 8})
    assert tuning.block_sizes("op/kernel", width=64) == {"block": 8}
    tuning.try_sizes("op/kernel", None)
    assert tuning.block_sizes("op/kernel", width=64) == {"block": 64}


@pytest.mark.parametrize(("better", "recorded"), [(0.5, {"block": 32}), (0.99, None)])
def test_tuning_records_what_beats_the_rule_by_more_than_noise(
    tables, monkeypatch, better, recorded
):
    monkeypatch.setitem(
        tuning.RULES, "op/kernel", lambda *, head_dim, page_size, bits: {"block": head_dim}
    )

    def seconds(tunable, *rest):
        block = tuning.block_sizes("op/kernel", head_dim=64, page_size=16, bits=32)["block"]
        return {64: 1.0, 32: better}.get(block, "ValueError: too much shared memory")

    monkeypatch.setattr(kernel_tuning, "_seconds", seconds)
    made = kernel_tuning.Tunable("op/kernel", "op", "gpu", {"block": (32, 512)}, lambda *_: [])
    assert kernel_tuning.tune(made, TINY, "float32", 1) == recorded
    assert (tables / "op.json").exists() == (recorded is not None)


def test_sizes_that_the_kernel_refuses_are_not_timed_and_no_other_backend_steps_in(
    tables, monkeypatch
):
    """On a CPU the gpu backend refuses everything, and xla would give a number for it."""
    (keys,) = (t for t in kernel_tuning.TUNABLES if t.kernel == "attention_mass/gpu_keys")
    monkeypatch.setattr(kernel_tuning, "Timer", lambda _: pytest.fail("something was timed"))
    told = kernel_tuning._seconds(keys, TINY, "bfloat16", 1)
    assert told == f"refused, gpu: the platform is {jax.default_backend()}"
    assert "xla" in OPERATIONS["attention_mass"].order("cpu")


def test_a_device_without_block_sizes_says_so(capsys, monkeypatch):
    monkeypatch.setattr(kernel_tuning, "TUNABLES", [])
    assert kernel_tuning.run(TINY, "float32", 1) == 0
    assert "nothing to tune on" in capsys.readouterr().out


def test_sizes_that_no_case_asks_for_are_not_recorded(tables, capsys):
    made = kernel_tuning.Tunable("op/kernel", "op", "gpu", {"block": (32,)}, lambda *_: [])
    assert kernel_tuning.tune(made, TINY, "float32", 1) is None
    assert "do not reach it" in capsys.readouterr().out


def test_a_table_is_of_one_kind_of_device_and_a_cpu_is_named_by_its_model(monkeypatch):
    monkeypatch.setattr(tuning, "_processor", lambda: "Some Model 9")
    kind = tuning._device_kind()
    assert (kind == "cpu Some Model 9") == (jax.default_backend() == "cpu")
    assert tuning._path("op", "cpu Some Model 9").name == "cpu-some-model-9.json"


@needs_compiler
def test_the_command_tunes_the_cpu_and_later_calls_use_what_it_wrote(tables, monkeypatch, capsys):
    from kvjax.benchmarks.__main__ import main

    (cpu_tile,) = (t for t in kernel_tuning.TUNABLES if t.kernel == "paged_attention/cpu_tile")
    monkeypatch.setattr(kernel_cases, "CPU", TINY)
    monkeypatch.setattr(kernel_tuning, "TUNABLES", [cpu_tile])
    monkeypatch.setattr(kernel_tuning, "_GAIN", 0.0)  # whatever is measured best is recorded
    assert main(["kernels", "--tune", "--dtype", "float32", "--rounds", "1"]) == 0
    assert "cpu_tile as it is: " in capsys.readouterr().out
    [[facts, sizes]] = json.loads((tables / "paged_attention.json").read_text())["cpu_tile"]
    assert facts == {"group": 2, "head_dim": 64}
    assert sizes["rows"] in cpu_tile.candidates["rows"]
    monkeypatch.setitem(tuning.RULES, "paged_attention/cpu_tile", lambda **_: {"rows": 1})
    assert tuning.block_sizes("paged_attention/cpu_tile", **facts) == sizes


def test_every_tunable_names_a_rule_and_its_sizes():
    facts = {"head_dim": 128, "page_size": 64, "group": 4, "bytes_per_key": 4096,
             "bytes_per_token": 4096, "bits": 16}  # fmt: skip
    for tunable in kernel_tuning.TUNABLES:
        rule = tuning.RULES[tunable.kernel]
        named = inspect.signature(rule).parameters
        sizes = rule(**{name: facts[name] for name in named})
        assert set(tunable.candidates) <= set(sizes), tunable.kernel
        assert tunable.backend in OPERATIONS[tunable.operation].implementations


def test_cases_of_a_tpu_have_packed_pages_and_cost_the_same():
    packed = dataclasses.replace(TINY, packed=True)
    one, other = (kernel_cases.decode(sizes, "float32", 2, 64) for sizes in (TINY, packed))
    assert isinstance(other.constants[0], PackedPages)
    assert (one.bytes, one.flops) == (other.bytes, other.flops)
    for case in kernel_cases.cases(packed, "float32"):
        for subject in case.build():
            jax.eval_shape(subject.step, subject.constants, subject.carry)


def test_the_command_line_measures_the_cases_that_it_is_given(tmp_path, monkeypatch, capsys):
    from kvjax.benchmarks.__main__ import main

    small = {"copy_bytes": 2**16, "matmul": 64, "moved": 64, "heads": TINY.heads}
    monkeypatch.setattr(kernel_cases, "CPU", dataclasses.replace(kernel_cases.CPU, **small))
    out = tmp_path / "k.json"
    arguments = ["--cases", "copy_pages", "--rounds", "1", "--quick", "--out", str(out)]
    assert main(["kernels", *arguments]) == 0
    assert [r["case"] for r in json.loads(out.read_text())["rows"]] == ["copy_pages"]
    assert "copy_pages" in capsys.readouterr().out
