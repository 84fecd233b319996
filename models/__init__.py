"""Models: a table of families, `load_model`, and random weights of any configuration.

A family is a function from a Hugging Face `config.json` to a `ModelConfig`, and optionally one that
renames or splits its tensors. To add one: write a file beside `llama.py`, add a row to `FAMILIES`
(or call `register_family` from outside the package).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kvjax.errors import UnsupportedModel
from kvjax.models import llama
from kvjax.models.config import ModelConfig
from kvjax.models.loading import WEIGHT_DTYPES, Loader, WeightDtype
from kvjax.models.sharding import Sharding
from kvjax.models.transformer import Transformer, kv_spec

Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Family:
    """How checkpoints of one `model_type` are read."""

    config: Callable[[dict[str, Any]], ModelConfig]
    tensors: Callable[[Tensors, ModelConfig], Tensors] = lambda tensors, config: tensors
    note: str = ""


FAMILIES: dict[str, Family] = {
    "llama": Family(llama.config, note="Llama 2 and 3.x, SmolLM2"),
    "mistral": Family(llama.config, note="sliding window where the checkpoint sets one"),
}


def register_family(model_type: str, family: Family) -> None:
    """Makes checkpoints with this `model_type` loadable; replaces an earlier entry."""
    FAMILIES[model_type] = family


def model_config(hf: dict[str, Any]) -> ModelConfig:
    """`ModelConfig` of a Hugging Face configuration.

    Raises:
      UnsupportedModel: no family reads this `model_type`, or it uses something not supported.
    """
    model_type = hf.get("model_type")
    if model_type not in FAMILIES:
        raise UnsupportedModel(
            f"model_type {model_type!r} is not supported; supported are {sorted(FAMILIES)}"
        )
    return FAMILIES[model_type].config(hf)


def load_model(
    config: ModelConfig,
    tensors: Tensors,
    *,
    dtype: WeightDtype = "bfloat16",
    num_positions: int,
    sharding: Sharding | None = None,
    deterministic: bool = False,
) -> Transformer:
    """Builds the model with placed weights. `num_positions` is the longest context it will serve."""
    family = FAMILIES[config.architecture]
    tensors = family.tensors(tensors, config)
    load = Loader(config, tensors, dtype, sharding or Sharding(), deterministic, num_positions)
    return Transformer(load)


__all__ = [
    "FAMILIES",
    "WEIGHT_DTYPES",
    "Family",
    "ModelConfig",
    "Sharding",
    "Transformer",
    "kv_spec",
    "load_model",
    "model_config",
    "register_family",
]
