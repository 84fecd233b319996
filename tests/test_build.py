"""From a model's name to an engine: what the settings must fit."""

import logging
from pathlib import Path

import pytest

from kvjax.build import build
from kvjax.config import EngineConfig, host_memory
from tests.tiny_checkpoint import write_tiny_checkpoint

PAGE_BYTES = 2 * 2 * 2 * 8 * 16 * 4  # layers, k and v, heads, channels, slots, float32


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


def config(**settings) -> EngineConfig:
    return EngineConfig(dtype="float32", max_num_seqs=2, max_num_batched_tokens=32, **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kv_cache_memory": PAGE_BYTES - 1}, f"at least {PAGE_BYTES} bytes"),
        ({"kv_cache_memory": host_memory() + 1}, f"exceeds the {host_memory()} bytes"),
        ({"max_model_len": 513}, "513 exceeds the model's context of 512"),
        ({"eviction_policy": "mru"}, "lru"),
        ({"chunk_eviction_policy": "mru"}, "saving"),
    ],
)
def test_settings_that_do_not_fit_are_named_with_their_limit(model, settings, said):
    with pytest.raises(ValueError, match=said):
        build(model, config(**settings))


def test_memory_is_what_was_asked_or_what_all_sequences_need(model, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "kvjax")
    monkeypatch.setattr(logging.getLogger("kvjax"), "propagate", True)
    asked = build(model, config(kv_cache_memory=5 * PAGE_BYTES + 1))
    assert asked.engine.scheduler.pool.num_pages == 5
    assert "5 pages of 16 tokens = 80 tokens (full 0 MiB)" in caplog.text
    enough = build(model, config(max_model_len=100))
    assert enough.engine.scheduler.pool.num_pages == 2 * 7 + 2
