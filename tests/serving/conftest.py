"""Servers that the tests of this folder share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.live_server import Client, serving
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def shared(tiny_path: Path) -> Iterator[Client]:
    with serving(tiny_path, {"force_reuse": True}) as client:
        yield client


@pytest.fixture
def served(shared: Client) -> Iterator[Client]:
    """One server for all tests that leave it as they found it; nothing may leak."""
    yield shared
    shared.settled()
