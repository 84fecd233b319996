"""Fixtures of the whole suite, and the device it runs on."""

import os
from pathlib import Path

import pytest

# Before anything imports jax.
os.environ["JAX_PLATFORMS"] = os.environ.get("KVJAX_TEST_DEVICE", "cpu")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model's GGUF file, fetched once; no model is a failure, not a skip."""
    from kvjax.models.pull import pull

    return pull("smollm2-135m")
