"""How an engine is set up."""

from typing import Any

import pytest

from kvjax.config import EngineConfig

BAD: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "float16"}, "float32, bfloat16 or int8, got 'float16'"),
    ({"max_model_len": 1}, "max_model_len must be an integer >= 2, got 1"),
    ({"max_num_seqs": 0}, "max_num_seqs must be an integer >= 1, got 0"),
    ({"max_num_seqs": 2.0}, r"max_num_seqs must be an integer >= 1, got 2\.0"),
    ({"max_num_batched_tokens": 15}, "max_num_batched_tokens must be an integer >= 16, got 15"),
    ({"max_num_seqs": 32, "max_num_batched_tokens": 31}, "at least max_num_seqs=32"),
    ({"page_size": 24}, r"a power of two in 16\.\.256, got 24"),
    ({"page_size": 512}, r"a power of two in 16\.\.256, got 512"),
    ({"kv_cache_memory": 0}, "kv_cache_memory must be an integer >= 1, got 0"),
    ({"kv_cache_memory": "2G"}, "kv_cache_memory must be an integer >= 1, got '2G'"),
    ({"memory_utilization": 0}, r"memory_utilization must be a number in \(0, 1\], got 0"),
    ({"memory_utilization": 1.5}, r"memory_utilization must be a number in \(0, 1\], got 1\.5"),
    ({"memory_utilization": "0.5"}, r"memory_utilization must be a number in \(0, 1\], got '0"),
    ({"enable_prefix_caching": "no"}, "enable_prefix_caching must be True or False, got 'no'"),
    ({"deterministic": 1}, "deterministic must be True or False, got 1"),
    ({"seed": "x"}, "seed must be an integer or None, got 'x'"),
    ({"max_sequences": 4}, "unknown setting 'max_sequences'; there are"),
]


@pytest.mark.parametrize(("settings", "said"), BAD, ids=str)
def test_a_bad_setting_is_refused_with_name_value_and_limit(settings, said):
    with pytest.raises(ValueError, match=said):
        EngineConfig().replaced(settings)
