import argparse
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from kvjax.benchmarks import engine, manifest
from kvjax.benchmarks.engine import PeerNotInstalled
from kvjax.benchmarks.peers import TARGETS, install, weights
from kvjax.benchmarks.prompts import TokenStream, text
from kvjax.benchmarks.results import Results
from kvjax.benchmarks.workers import Target, Worker


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    engine.add_arguments(parser)
    return parser.parse_args(arguments)


def test_an_absent_environment_says_how_to_make_or_name_one(tmp_path):
    with pytest.raises(PeerNotInstalled) as caught:
        engine.environment_python("vllm", {"vllm": str(tmp_path / "gone")})
    message = str(caught.value)
    assert str(tmp_path / "gone") in message
    assert "benchmarks/peers/install.py vllm" in message
    assert "--peer-env vllm=PATH" in message


def test_the_usual_folder_of_an_environment_is_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVJAX_CACHE_DIR", str(tmp_path))
    python = tmp_path / "peers" / "openvino" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert engine.environment_python("openvino", {}) == python


def test_an_uninstalled_peer_gets_an_error_row_and_the_others_become_targets(tmp_path, monkeypatch):
    monkeypatch.setenv("KVJAX_CACHE_DIR", str(tmp_path))
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    args = parse("--targets", "kvjax,vllm,transformers", "--kvjax-option", "max_num_seqs=4")
    out = Results(tmp_path / "run.json", {})
    (target,) = engine.find_targets(args, "float32", gguf, {}, out)
    assert target.name == "kvjax"
    assert target.options["llm_options"] == {"max_num_seqs": 4}
    assert [e["target"] for e in out.errors] == ["vllm", "transformers"]


def test_a_dtype_a_peer_does_not_have_is_an_error_row(tmp_path):
    out = Results(tmp_path / "run.json", {})
    args = parse("--targets", "vllm")
    assert engine.find_targets(args, "int8", tmp_path / "model.gguf", {}, out) == []
    assert "vllm has no int8 here" in out.errors[0]["error"]


def test_two_environments_of_kvjax_are_two_targets(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "python").symlink_to(sys.executable)
    given = [f"a={tmp_path}/one", f"b={tmp_path}/two"]
    assert list(engine.kvjax_pythons(given)) == ["kvjax-a", "kvjax-b"]


def test_more_threads_than_cpus_are_refused():
    with pytest.raises(ValueError, match="--threads 100000"):
        engine._cpus(100_000)


@pytest.mark.parametrize("text", ["novalue", "=x", "name="])
def test_a_malformed_pair_is_refused_with_its_option(text):
    with pytest.raises(ValueError, match="--peer-env wants NAME=VALUE"):
        engine.split_pairs([text], "--peer-env")


def test_every_target_has_its_file_and_an_installer_or_is_kvjax():
    for name, peer in TARGETS.items():
        assert peer.file.is_file()
        assert name == "kvjax" or peer.environment in install.PEERS
        assert set(peer.weights.values()) <= {"", *weights.FORMATS}


def test_workers_and_installer_import_nothing_outside_the_standard_library_at_the_top():
    for path in (*(p.file for p in TARGETS.values()), engine.TARGETS["vllm"].file):
        heads = [
            line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))
        ]
        modules = {line.split()[1].split(".")[0] for line in heads}
        assert modules <= sys.stdlib_module_names


STUB = """
import types
class SamplingParams:
    def __init__(self, max_tokens, temperature, ignore_eos):
        assert (temperature, ignore_eos) == (0.0, True)
        self.max_tokens = max_tokens
class LLM:
    def __init__(self, model, **options):
        assert options == {"dtype": "float32", "max_model_len": 4096, "max_num_seqs": 4,
                           "max_num_batched_tokens": 512}
        self.warm = 0
    def warm_up(self):
        self.warm += 1
    def reset_prefix_cache(self):
        self.warm += 10
    def generate(self, prompts, params):
        new = types.SimpleNamespace(token_ids=[self.warm] * params.max_tokens)
        times = types.SimpleNamespace(time_to_first_token=0.5)
        out = types.SimpleNamespace(outputs=[new], metrics=times, num_cached_tokens=3)
        return [out for _ in prompts]
"""


@pytest.mark.parametrize("warm_up", [True, False])
def test_the_kvjax_target_calls_the_public_interface(tmp_path, warm_up):
    (tmp_path / "kvjax").mkdir()
    (tmp_path / "kvjax" / "__init__.py").write_text(STUB)
    options = {"model": "m", "dtype": "float32", "llm_options": {"max_num_seqs": 4}}
    target = Target(
        name="kvjax",
        python=Path(sys.executable),
        file=TARGETS["kvjax"].file,
        options=options,
        env={"PYTHONPATH": str(tmp_path)},
    )
    with Worker(target) as worker:
        worker.load(warm_up=warm_up)
        worker.reset()
        done = worker.generate([[1, 2], [3]], 2)
    assert done.token_ids == [[10 + warm_up] * 2] * 2
    assert done.first_token_s == [0.5, 0.5]
    assert done.cached_tokens == [3, 3]


def test_requirements_leave_out_torch_and_extras(tmp_path):
    import zipfile

    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        lines = ["Name: x", "Requires-Dist: torch==1", "Requires-Dist: torchaudio; a == 'b'"]
        lines += [
            "Requires-Dist: numpy>=2",
            "Requires-Dist: av; extra == 'audio'",
            "",
            "Requires-Dist: no",
        ]
        archive.writestr("x.dist-info/METADATA", "\n".join(lines))
    assert install.requirements(wheel) == ["numpy>=2"]


def test_unpermuting_puts_the_even_rows_of_a_head_before_the_odd_ones():
    weight = np.arange(8)[:, None] * np.ones((8, 3))
    assert weights.unpermuted(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_text_is_long_enough_and_a_stream_never_repeats():
    assert len(text()) > 400_000
    stream = TokenStream(range(10))
    assert stream.take(4) + stream.take(6) == list(range(10))
    with pytest.raises(ValueError, match="10 tokens, 11 wanted"):
        stream.take(1)


def test_the_manifest_names_commit_machine_and_hashes_and_no_path(tmp_path):
    model = tmp_path / "model.gguf"
    model.write_bytes(b"abc")
    about = manifest.collect(
        threads=2,
        rounds=1,
        dtypes=["float32"],
        cases=["prefill"],
        sizes={"prompt": 8},
        prompt_ids=[1, 2],
        model=model,
        env={"OMP_NUM_THREADS": "2"},
    )
    assert about["model"]["file"] == "model.gguf"
    assert about["model"]["sha256"].startswith("ba7816bf")
    assert about["machine"]["cores"] >= 1
    assert about["settings"]["OMP_NUM_THREADS"] == "2"
    assert len(about["load_average_before"]) == 3
    assert str(tmp_path) not in str(about)
    assert os.path.sep not in str(about["commit"])
