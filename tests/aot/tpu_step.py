"""The engine's decode step as `tests.aot.tpu` compiles it: packed pages, layers, head, a draw."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import numpy as np
from flax import nnx

from kvjax.cache.pages import KVPages
from kvjax.decode import DecodeState, stage_arguments
from kvjax.models import kv_spec, load_model, model_config, random_tensors
from kvjax.step import Bucket, StepLayout, step

SEQS, PAGES_PER_SEQ, NUM_PAGES, PAGE = 16, 32, 8192, 64
SMOLLM2 = {  # two layers of SmolLM2-135M
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 2, "num_attention_heads": 9, "num_key_value_heads": 3,
    "max_position_embeddings": PAGES_PER_SEQ * PAGE, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip


def engine_step(
    array: Callable[[tuple[int, ...], Any], Any], kv_dtype: str, cascade: bool
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A step of `SEQS` sequences, pages first, and its arguments, which `array` describes."""
    config = model_config(SMOLLM2)
    with mock.patch.object(
        jax, "default_backend", return_value="tpu"
    ):  # weights lie as XLA has them
        model = load_model(
            config, random_tensors(config), dtype="bfloat16", num_positions=config.max_position
        )
    graph, state = nnx.split(model)
    weights, tree = jax.tree.flatten(state)
    spec = kv_spec(config, kv_dtype, PAGE, "packed")
    bucket = Bucket(SEQS, SEQS, SEQS, decode=True, cascade=cascade)
    layout = StepLayout(bucket, spec, PAGES_PER_SEQ, stage_arguments())

    def run(pages: KVPages, weights: Any, state: DecodeState, buffer: Any) -> Any:
        with mock.patch.object(jax, "default_backend", return_value="tpu"):
            model = nnx.merge(graph, jax.tree.unflatten(tree, weights))
            return step(model, pages, state, layout.unpack(buffer), decode=True)

    state = jax.eval_shape(lambda: DecodeState.allocate(SEQS, config.vocab_size))
    arguments = (KVPages.abstract(spec, NUM_PAGES), weights, state)
    described = jax.tree.map(lambda x: array(x.shape, x.dtype), arguments)
    return run, (*described, array((layout.size,), np.int32))
