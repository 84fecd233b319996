"""Runs random models on one device and on a mesh, and prints what came out as JSON.

A program of its own, because the number of virtual CPU devices is fixed when jax starts:

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m tests.models.sharded_run smollm2
"""

import json
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kvjax.models import ModelConfig, Sharding, load_model, model_config, random_tensors
from kvjax.models.loading import WeightDtype
from tests.models.run_model import PagedRun

PROMPT, DECODED = 24, 4  # tokens

SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 3072,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
# Neither its MLP nor its vocabulary divides by four.
UNEVEN = SMOLLM2 | {
    "model_type": "qwen2",  # with biases
    "vocab_size": 301,
    "hidden_size": 64,
    "intermediate_size": 90,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
LATENT = UNEVEN | {
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_attention_heads": 4,
}


def compare(
    config: ModelConfig, ways: int, dtype: WeightDtype = "float32", **kv: Any
) -> dict[str, Any]:
    """Prefill and greedy decoding with and without a mesh of `ways` devices, KV kept as `kv`."""
    tensors = random_tensors(config)
    mesh = Mesh(np.asarray(jax.devices()[:ways]), ("model",))
    # In int8 the last bit of an activation can move it a whole step, so both sides run the same
    # products: those of a mesh, which here has one device.
    alone = Mesh(np.asarray(jax.devices()[:1]), ("model",)) if dtype == "int8" else None
    plain = load_model(config, tensors, dtype=dtype, num_positions=64, sharding=Sharding(alone))
    split = load_model(config, tensors, dtype=dtype, num_positions=64, sharding=Sharding(mesh))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, PROMPT), dtype=np.int32)
    runs = [
        PagedRun(model, num_seqs=2, max_len=64, max_tokens=2 * PROMPT, **kv)
        for model in (plain, split)
    ]
    new, decode, differences, margins, equal = {0: ids[0], 1: ids[1]}, False, [], [], []
    for _ in range(1 + DECODED):
        mine, theirs = (_last(run.step(new, decode=decode)) for run in runs)
        differences.append(float(np.abs(mine - theirs).max()))
        ordered = np.sort(mine, axis=-1)
        margins += (ordered[:, -1] - ordered[:, -2]).tolist()
        equal += (mine.argmax(-1) == theirs.argmax(-1)).tolist()
        new, decode = {seq: mine[seq].argmax(keepdims=True) for seq in (0, 1)}, True
    pool = jax.tree.leaves(runs[1].pages)[0]
    return {
        "difference": max(differences),
        "margins": margins,
        "equal": equal,
        "pool": _shares(pool),
        "embedding": _shares(split.embedding.table.weight[...]),
        "down": _shares(split.blocks[0].mlp.down.weight[...]),
        "o": _shares(_o_weight(split)),
    }


def _last(logits: dict[int, np.ndarray]) -> np.ndarray:
    return np.stack([logits[0][-1], logits[1][-1]])


def _o_weight(model: Any) -> jax.Array:
    o = model.blocks[0].attention.o
    return (o.linear if hasattr(o, "linear") else o).weight[...]


def _shares(x: jax.Array) -> dict[str, Any]:
    """What each device holds of `x`."""
    shards = x.addressable_shards
    return {
        "devices": len(shards),
        "whole": list(x.shape),
        "shard": list(shards[0].data.shape),
        "kind": "replicated" if x.is_fully_replicated else "split",
    }


PACKED = {"layout": "packed", "kv_dtype": "int8"}
COMPARISONS: dict[str, tuple[dict[str, Any], int, WeightDtype, dict[str, Any]]] = {
    "smollm2": (SMOLLM2, 3, "float32", {}),
    "uneven": (UNEVEN, 4, "float32", {}),
    "uneven-packed": (UNEVEN, 2, "float32", PACKED),
    "smollm2-int8": (SMOLLM2, 3, "int8", {}),
    "latent": (LATENT, 4, "float32", {}),
    "latent-packed": (LATENT, 4, "float32", PACKED),
}


def main() -> None:
    """Prints a JSON object with a key per comparison named on the command line."""
    results = {}
    for name in sys.argv[1:]:
        hf, ways, dtype, kv = COMPARISONS[name]
        results[name] = compare(model_config(hf), ways, dtype, **kv)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
