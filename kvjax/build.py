"""From a model's name to an engine: checkpoint, weights, memory, compilation cache."""

import dataclasses
import logging
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from kvjax.cache.pages import KVSpec, layout_for
from kvjax.config import EngineConfig, cache_dir, host_memory
from kvjax.engine import Engine
from kvjax.facts import model_facts
from kvjax.intake import Intake
from kvjax.models import ModelConfig, Sharding, kv_spec, load_model, model_config
from kvjax.models.checkpoint import Checkpoint, open_checkpoint
from kvjax.models.tokenizers import Tokenizer, load_tokenizer
from kvjax.pallas_kernels import native
from kvjax.reuse.gate import Gate, Limits, Verdicts

log = logging.getLogger("kvjax")

_CPU_SHARE = 0.05  # of the host's memory that KV takes by default


@dataclasses.dataclass(frozen=True)
class Built:
    """What `LLM` and `AsyncLLM` stand on."""

    engine: Engine
    intake: Intake
    checkpoint: Checkpoint
    config: ModelConfig
    tokenizer: Tokenizer


def build(model: str | Path, config: EngineConfig, mesh: Mesh | None = None) -> Built:
    """Opens a checkpoint, places its weights and sizes the KV cache. Compiles nothing yet.

    Raises:
      ModelNotFound, UnsupportedModel, CorruptWeights, TokenizerNotFound: see `kvjax.errors`.
      ReuseRefused: `config.reuse` was not measured on this model, or loses too much.
      ValueError: a setting does not fit the model.
    """
    if config.compilation_cache:
        enable_compilation_cache()
    native.folder = cache_dir() / "native"
    checkpoint = open_checkpoint(model)
    arch = model_config(checkpoint.config)
    tokenizer = load_tokenizer(checkpoint)
    max_model_len = config.max_model_len or arch.max_position
    if max_model_len > arch.max_position and arch.rope.scaling not in ("dynamic", "longrope"):
        raise ValueError(
            f"max_model_len={max_model_len} exceeds the model's context of {arch.max_position}"
        )
    sharding = Sharding(mesh)
    transformer = load_model(
        arch,
        checkpoint.tensors,
        dtype=config.dtype,
        num_positions=max_model_len,
        sharding=sharding,
        deterministic=config.deterministic,
    )
    platform = jax.default_backend()
    page_size = config.page_size or (16 if platform == "cpu" else 64)
    spec = kv_spec(arch, config.kv_dtype, page_size, layout_for(platform), sharding.ways)
    num_pages = _num_pages(spec, config, max_model_len)
    _announce(spec, num_pages, config, max_model_len)
    ends = tuple(dict.fromkeys((*arch.eos_token_ids, *tokenizer.eos_token_ids)))
    intake = Intake(
        tokenizer,
        vocab_size=arch.vocab_size,
        end_token_ids=ends,
        max_model_len=max_model_len,
        max_prompt_tokens=num_pages * page_size,
        seed=config.seed,
        clock=time.monotonic,
        reuse=config.reuse,
        gate=Gate(
            verdicts(checkpoint, config),
            Limits(config.max_reuse_loss, config.min_reuse_agreement),
            forced=config.force_reuse,
            facts=model_facts(arch, spec),
        ),
    )
    engine = Engine(
        transformer,
        spec,
        num_pages,
        config,
        max_model_len,
        decode_token=lambda token: tokenizer.decode([token], skip_special_tokens=False),
    )
    return Built(engine, intake, checkpoint, arch, tokenizer)


def verdicts(checkpoint: Checkpoint, config: EngineConfig) -> Verdicts:
    """What reuse was measured to cost a model with the types of `config`."""
    arch = model_config(checkpoint.config)
    scaling, length = arch.rope.scaling, config.max_model_len or arch.max_position
    return Verdicts(
        cache_dir() / "reuse", lambda: checkpoint.fingerprint, config.dtype, config.kv_dtype,
        length if scaling in ("dynamic", "longrope") else None,
    )  # fmt: skip


def enable_compilation_cache() -> None:
    """Keeps compiled programs in kvjax's cache folder, unless the caller already set another."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _num_pages(spec: KVSpec, config: EngineConfig, max_model_len: int) -> int:
    """Pages that the memory allows; never more than every sequence at full length needs."""
    wanted = config.max_num_seqs * -(-max_model_len // spec.page_size) + config.max_num_seqs
    if config.kv_cache_memory is not None:
        if jax.default_backend() == "cpu" and config.kv_cache_memory > host_memory():
            raise ValueError(
                f"kv_cache_memory={config.kv_cache_memory} exceeds the {host_memory()} bytes that "
                f"this machine has"
            )
        pages = config.kv_cache_memory // spec.page_bytes
    else:
        pages = min(wanted, _free_memory(config.memory_utilization) // spec.page_bytes)
    if pages < 1:
        raise ValueError(
            f"the KV cache needs at least {spec.page_bytes} bytes (one page), "
            f"kv_cache_memory={config.kv_cache_memory}"
        )
    return int(pages)


def _free_memory(utilization: float) -> int:
    """Bytes for KV after the weights are placed, on the fullest device."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if any(s is None or "bytes_limit" not in s for s in stats):
        return int(host_memory() * _CPU_SHARE)
    return min(
        int(s["bytes_limit"] * utilization) - s["bytes_in_use"] for s in stats if s is not None
    )


def _announce(spec: KVSpec, num_pages: int, config: EngineConfig, max_model_len: int) -> None:
    tokens = num_pages * spec.page_size
    groups = ", ".join(
        f"{group.kind}{'' if group.window is None else f' {group.window}'} {size / 2**20:.0f} MiB"
        for group, size in zip(spec.groups, spec.group_bytes(tokens), strict=True)
    )
    if not log.hasHandlers():  # an application that configures logging decides for itself
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
        log.propagate = False
    log.info(
        "KV cache: %d pages of %d tokens = %d tokens (%s); up to %d sequences of %d tokens, "
        "%d tokens a step",
        num_pages, spec.page_size, tokens, groups, config.max_num_seqs, max_model_len,
        config.max_num_batched_tokens,
    )  # fmt: skip


def tensor_parallel_mesh(ways: int) -> Mesh | None:
    """A mesh of `ways` devices on the axis "model"; None for one.

    Raises:
      ValueError: there are not that many devices.
    """
    if ways == 1:
        return None
    devices = jax.local_devices()
    if not 1 < ways <= len(devices):
        raise ValueError(f"tensor_parallel_size={ways}, but there are {len(devices)} devices")
    return Mesh(np.array(devices[:ways]), ("model",))
