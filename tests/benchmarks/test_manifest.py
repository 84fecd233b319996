import copy
import json

import pytest

from kvjax import LLM
from kvjax.benchmarks import engine_manifest, manifest
from kvjax.benchmarks.results import Results
from tests.benchmarks.result_schema import SCHEMA, complaints
from tests.tiny_checkpoint import CHAT, write_tiny_checkpoint


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    return LLM(folder, dtype="float32", max_num_seqs=2, max_num_batched_tokens=32, seed=7)


@pytest.fixture
def record(llm, tmp_path):
    about = manifest.base("engine")
    about["engine"] = engine_manifest.of_engine(llm.engine, llm.get_tokenizer())
    out = Results(tmp_path / "run.json", about)
    out.add("kvjax", "float32", "prefill_tps", 1.0)
    out.status = "complete"
    out.save()
    return json.loads((tmp_path / "run.json").read_text())


def test_a_result_with_its_manifest_is_what_the_schema_says(record):
    assert complaints(record) == []


def test_the_manifest_says_what_the_engine_is(llm, record):
    import hashlib

    about = record["manifest"]["engine"]
    assert about["dtypes"] == {"weights": "float32", "kv": "float32", "accumulation": "float32"}
    assert about["page_size"] == llm.engine.spec.page_size
    assert about["num_pages"] == llm.engine.scheduler.pool.num_pages
    assert about["seed"] == 7
    assert about["limits"]["max_num_seqs"] == 2
    assert about["cache"]["enable_prefix_caching"] is True
    assert about["sampler_order"].index("temperature") < about["sampler_order"].index("top_p")
    assert about["backends"]["paged_attention"] in ("cpu", "xla")
    assert about["chat_template_sha256"] == hashlib.sha256(CHAT.encode()).hexdigest()
    assert about["tokenizer_sha256"] == llm.get_tokenizer().fingerprint


def test_xla_flags_and_versions_are_in_the_manifest(monkeypatch):
    import jax

    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    about = manifest.base("serve")
    assert about["settings"]["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=false"
    assert about["versions"]["jax"] == jax.__version__


_ENGINE = SCHEMA["$defs"]["engine"]["required"]
_BASE = SCHEMA["$defs"]["manifest"]["required"]


@pytest.mark.parametrize(
    ("part", "key"), [(None, k) for k in _BASE] + [("engine", k) for k in _ENGINE]
)
def test_a_result_without_a_part_of_its_manifest_is_refused(record, part, key):
    worse = copy.deepcopy(record)
    del (worse["manifest"] if part is None else worse["manifest"][part])[key]
    assert complaints(worse)


def test_counters_tell_what_a_run_added(llm):
    before = engine_manifest.Counters.of(llm.engine)
    llm.generate([[1, 2, 3]])
    added = engine_manifest.Counters.of(llm.engine).since(before)
    assert added["compiles"] > 0
    assert added["compile_seconds"] > 0
    assert 0 < added["padding_waste"] < 1
