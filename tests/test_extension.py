"""A model family, a logit stage, an eviction policy and a kernel backend from outside the package.

One module that is not part of kvjax registers all four, and one engine then runs on them.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

from kvjax import LLM, SamplingParams
from kvjax.cache.radix import EVICTION_POLICIES
from kvjax.decode import LOGIT_STAGES
from kvjax.models import FAMILIES
from kvjax.pallas_kernels.dispatch import OPERATIONS
from tests.tiny_checkpoint import write_tiny_checkpoint

OUTSIDE = '''
"""What somebody adds to kvjax in a file of their own."""

import jax.numpy as jnp

from kvjax.cache.radix import EVICTION_POLICIES
from kvjax.decode import register_stage
from kvjax.models import Family, llama, register_family
from kvjax.pallas_kernels.dispatch import OPERATIONS

CALLS = {"family": 0, "policy": 0, "kernel": 0}


def config(hf):
    CALLS["family"] += 1
    return llama.config(hf, qk_norm=True)


class Always:
    """Makes one token the only one."""

    name = "always"
    arguments = {"always": -1.0}

    def wanted(self, rows):
        return rows.extra["always"] >= 0

    def apply(self, logits, state, rows):
        ids = jnp.arange(logits.shape[1], dtype=jnp.float32)
        return jnp.where(ids == rows.extra["always"][:, None], logits, -jnp.inf)


class Largest:
    """The longest spans go first."""

    def priority(self, leaf):
        CALLS["policy"] += 1
        return (-leaf.num_tokens,)


ATTENTION = OPERATIONS["paged_attention"]


def careful(q, *args, **kwargs):
    """Refuses what the decode step asks for, and so leaves it to the next backend."""
    CALLS["kernel"] += 1
    if kwargs.get("max_query_len") == 1:
        raise NotImplementedError("careful: one token per sequence")
    return ATTENTION.implementations["xla"](q, *args, **kwargs)


def register():
    register_family("theirs", Family(config, note="from outside"))
    register_stage(Always(), before="temperature")
    EVICTION_POLICIES["largest"] = Largest
    ATTENTION.register("careful", careful, platforms=("cpu",))
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch):
    """The module, registered; the tables are restored afterwards."""
    path = tmp_path / "somebodys_extension.py"
    path.write_text(OUTSIDE)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    attention = OPERATIONS["paged_attention"]
    stages = list(LOGIT_STAGES)
    monkeypatch.setattr(attention, "implementations", dict(attention.implementations))
    monkeypatch.setattr(attention, "preferred", dict(attention.preferred))
    spec.loader.exec_module(module)
    module.register()
    yield module
    LOGIT_STAGES[:] = stages
    FAMILIES.pop("theirs")
    EVICTION_POLICIES.pop("largest")


def test_one_file_from_outside_adds_a_family_a_stage_a_policy_and_a_backend(outside, tmp_path):
    model = write_tiny_checkpoint(tmp_path / "model", model_type="theirs")
    llm = LLM(
        model, dtype="float32", max_num_seqs=3, max_num_batched_tokens=48, max_model_len=96,
        kv_cache_memory=40_000, eviction_policy="largest",
    )  # fmt: skip
    assert llm.model_config.qk_norm
    forced = SamplingParams(max_tokens=3, extra_args={"always": 65.0}, ignore_eos=True)
    free = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    first, second = llm.generate(["with the stage", "without it"], [forced, free])
    assert first.outputs[0].token_ids == (65, 65, 65)
    assert second.outputs[0].token_ids != (65, 65, 65)
    llm.generate([f"{i} filler {'x' * 40}" for i in range(12)], free)  # more than the pages hold
    assert all(outside.CALLS.values()), outside.CALLS
    told = OPERATIONS["paged_attention"].explain("cpu")
    assert told["careful"] == "chosen"
    assert told["xla"] == "after careful"
