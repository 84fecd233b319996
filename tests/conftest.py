"""Fixtures of the whole suite, and the device it runs on."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports jax.
os.environ["JAX_PLATFORMS"] = os.environ.get("KVJAX_TEST_DEVICE", "cpu")


@pytest.fixture(scope="module", autouse=True)
def room_for_programs() -> Iterator[None]:
    """Drops compiled programs before they take the last of a process's memory mappings.

    Each takes some twenty, Linux allows 65,530, and a compile that gets none ends the process. The
    engines that modules keep in caches of functions hold theirs as long as they live.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 25_000:
        import jax

        for name, module in list(sys.modules.items()):
            if name.startswith("tests."):
                for value in list(vars(module).values()):
                    if hasattr(value, "cache_clear"):
                        value.cache_clear()
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model's GGUF file, fetched once; no model is a failure, not a skip."""
    from kvjax.models.pull import pull

    return pull("smollm2-135m")
