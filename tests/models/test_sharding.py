"""Tensor parallelism on virtual CPU devices: the same logits, from weights and KV really split."""

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from kvjax.models import Sharding, load_model, model_config
from tests.models.sharded_run import COMPARISONS, SMOLLM2

SLOW = ("smollm2-int8", "latent", "latent-packed")


def _run(*names: str) -> dict[str, Any]:
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # the time goes into compiling
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.sharded_run", *names],
        env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def quick() -> dict[str, Any]:
    return _run(*(name for name in COMPARISONS if name not in SLOW))


@pytest.fixture(scope="module")
def slow() -> dict[str, Any]:
    return _run(*SLOW)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in COMPARISONS],
)
def test_a_mesh_gives_the_logits_and_tokens_of_one_device(
    name: str, request: pytest.FixtureRequest
) -> None:
    result = request.getfixturevalue("slow" if name in SLOW else "quick")[name]
    assert result["difference"] < 1e-4
    decided = np.asarray(result["margins"]) > 1e-3
    assert decided.sum() >= 8
    assert np.asarray(result["equal"])[decided].all()


def test_pages_and_weights_are_really_split(quick: dict[str, Any]) -> None:
    three = quick["smollm2"]
    assert three["pool"]["shard"][1] * 3 == three["pool"]["whole"][1] == 3
    assert three["embedding"]["shard"] == [1024, 576]
    assert three["down"]["shard"] == [576, 512]
    assert three["o"]["shard"] == [576, 192]
    assert {three[key]["devices"] for key in ("pool", "embedding", "down", "o")} == {3}


def test_an_mlp_or_vocabulary_that_does_not_divide_is_replicated(quick: dict[str, Any]) -> None:
    four = quick["uneven"]
    assert (four["pool"]["kind"], four["o"]["kind"]) == ("split", "split")
    assert (four["down"]["kind"], four["embedding"]["kind"]) == ("replicated", "replicated")


def test_kv_heads_that_do_not_divide_are_refused() -> None:
    mesh = AbstractMesh((2,), ("model",))
    config = model_config(SMOLLM2)
    with pytest.raises(ValueError, match="3 KV heads cannot be split 2 ways"):
        load_model(
            config,
            {},  # before any weight is read
            dtype="float32",
            num_positions=8,
            sharding=Sharding(mesh),  # type: ignore[arg-type]
        )


def test_the_table_says_which_axes_are_split() -> None:
    sharding = Sharding(AbstractMesh((2, 2), ("data", "model")))  # type: ignore[arg-type]
    assert sharding.spec(("kv_heads", None), (4, 8)) == PartitionSpec("model", None)
    assert sharding.spec(("vocab", None), (7, 8)) == PartitionSpec(None, None)
    other = Sharding(sharding.mesh, table=(("mlp", "data"),))
    assert other.spec(("kv_heads", "mlp"), (3, 8)) == PartitionSpec(None, "data")
