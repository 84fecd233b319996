"""Models: a table of families, `load_model`, and random weights of any configuration.

A family is a function from a Hugging Face `config.json` to a `ModelConfig`, and optionally one that
renames or splits its tensors. To add one: write a file beside `llama.py`, add a row to `FAMILIES`
(or call `register_family` from outside the package).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from kvjax.errors import UnsupportedModel
from kvjax.models import deepseek, gemma, llama, mistral, phi3, qwen, smollm3
from kvjax.models.config import ModelConfig
from kvjax.models.loading import WEIGHT_DTYPES, Loader, WeightDtype
from kvjax.models.random_weights import random_tensors
from kvjax.models.sharding import Sharding
from kvjax.models.tensor_names import Tensors
from kvjax.models.transformer import Transformer, kv_spec


@dataclasses.dataclass(frozen=True)
class Family:
    """How checkpoints of one `model_type` are read."""

    config: Callable[[dict[str, Any]], ModelConfig]
    tensors: Callable[[Tensors, ModelConfig], Tensors] = lambda tensors, config: tensors
    note: str = ""


FAMILIES: dict[str, Family] = {
    "llama": Family(llama.config, note="Llama 2 and 3.x, SmolLM2; every rotary scaling"),
    "mistral": Family(mistral.config, note="sliding window where the checkpoint sets one"),
    "qwen2": Family(qwen.qwen2_config, note="Qwen2 and 2.5"),
    "qwen3": Family(qwen.qwen3_config, note="dense"),
    "gemma2": Family(gemma.gemma2_config, note="two KV groups"),
    "gemma3_text": Family(gemma.gemma3_config, note="two KV groups, two rotary bases"),
    "gemma3": Family(gemma.gemma3_config, gemma.gemma3_tensors, note="the text model alone"),
    "phi3": Family(phi3.config, phi3.tensors, note="Phi-3, Phi-3.5-mini, Phi-4-mini"),
    "smollm3": Family(smollm3.config),
    "deepseek_v2": Family(deepseek.config, note="latent KV; dense MLPs only"),
    "deepseek_v3": Family(deepseek.config, note="latent KV; dense MLPs only"),
}


def register_family(model_type: str, family: Family) -> None:
    """Makes checkpoints with this `model_type` loadable; replaces an earlier entry."""
    FAMILIES[model_type] = family


def model_config(hf: dict[str, Any]) -> ModelConfig:
    """`ModelConfig` of a Hugging Face configuration.

    Raises:
      UnsupportedModel: no family reads this `model_type`, or it uses something not supported.
      ValueError: a size in it cannot be.
    """
    model_type = hf.get("model_type")
    for key in ("num_local_experts", "num_experts"):
        if hf.get(key):
            raise UnsupportedModel(f"{model_type}: mixture of experts ({key}={hf[key]})")
    if model_type not in FAMILIES:
        raise UnsupportedModel(
            f"model_type {model_type!r} is not supported; supported are {sorted(FAMILIES)}"
        )
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method", "unknown method")
        raise UnsupportedModel(
            f"weights quantised as {method!r} are not read; use the unquantised checkpoint, and "
            f"dtype='int8' to quantise it here"
        )
    try:
        return FAMILIES[model_type].config(hf)
    except KeyError as missing:
        raise UnsupportedModel(f"the {model_type} configuration has no {missing}") from None
    except (TypeError, AttributeError, ArithmeticError) as error:  # a number that is none
        raise UnsupportedModel(f"the {model_type} configuration is malformed: {error}") from error


def load_model(
    config: ModelConfig,
    tensors: Tensors,
    *,
    dtype: WeightDtype = "bfloat16",
    num_positions: int,
    sharding: Sharding | None = None,
    deterministic: bool = False,
) -> Transformer:
    """Builds the model with placed weights. `num_positions` is the longest context it will serve.

    Raises:
      CorruptWeights: a tensor is missing or has another shape than `config` implies.
      ValueError: unknown `dtype`, or KV heads that the mesh does not divide.
    """
    sharding = sharding or Sharding()
    if sharding.mesh is not None and config.latent is None:  # a latent has one head: replicated
        sharding.spec(("kv_heads",), (config.num_kv_heads,))  # refuses before anything is read
    tensors = FAMILIES[config.architecture].tensors(tensors, config)
    load = Loader(config, tensors, dtype, sharding, deterministic, num_positions)
    return Transformer(load)


__all__ = [
    "FAMILIES",
    "WEIGHT_DTYPES",
    "Family",
    "ModelConfig",
    "Sharding",
    "Tensors",
    "Transformer",
    "kv_spec",
    "load_model",
    "model_config",
    "random_tensors",
    "register_family",
]
