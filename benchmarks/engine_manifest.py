"""What a kvjax engine was measured as: device, types, kernels, cache, sampler, tokenizer."""

import dataclasses
import hashlib
import resource
import sys
from collections.abc import Mapping
from typing import Any

from kvjax.benchmarks.bounds import Work
from kvjax.pallas_kernels.dispatch import OPERATIONS

_ACCUMULATION = {"int8": "int32 products, float32 sums"}  # by type of the weights; else float32
_CACHE = (
    "enable_prefix_caching", "eviction_policy", "chunk_cache_share", "kv_cache_memory",
    "memory_utilization", "max_reuse_loss", "force_reuse",
)  # fmt: skip
_LIMITS = ("max_num_seqs", "max_num_batched_tokens", "deterministic", "overlap")


def device() -> dict[str, Any]:
    """The default device: platform, kind, how many there are."""
    import jax

    one = jax.devices()[0]
    return {"platform": one.platform, "kind": one.device_kind, "count": jax.device_count()}


def backends(platform: str) -> dict[str, str]:
    """Operation -> the backend that is chosen on `platform`; "none" where all refuse."""
    return {
        name: next((b for b, why in op.explain(platform).items() if why == "chosen"), "none")
        for name, op in sorted(OPERATIONS.items())
    }


def of_engine(engine: Any, tokenizer: Any) -> dict[str, Any]:
    """The engine's part of a manifest; `engine` is `LLM.engine` or `AsyncLLM.engine`."""
    from kvjax.decode import LOGIT_STAGES

    config = engine.config
    where = device()
    template = tokenizer.chat_template
    return {
        "device": where,
        "dtypes": {
            "weights": config.dtype,
            "kv": config.kv_dtype,
            "accumulation": _ACCUMULATION.get(config.dtype, "float32"),
        },
        "backends": backends(where["platform"]),
        "page_size": engine.spec.page_size,
        "page_layout": engine.spec.layout,
        "num_pages": engine.runner.num_pages,
        "cache": {name: getattr(config, name) for name in _CACHE}
        | {"reuse": None if config.reuse is None else str(config.reuse)},
        "limits": {name: getattr(config, name) for name in _LIMITS}
        | {"max_model_len": engine.limits.max_model_len},
        "sampler_order": [stage.name for stage in LOGIT_STAGES],
        "seed": config.seed,
        "work_per_token": dataclasses.asdict(Work.of(engine)),
        "tokenizer_sha256": tokenizer.fingerprint,
        "chat_template_sha256": template and hashlib.sha256(template.encode()).hexdigest(),
    }


def peak_memory() -> dict[str, float | None]:
    """MiB that this process had at most, and that its device held where the device tells."""
    import jax

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = jax.devices()[0].memory_stats() or {}
    held = told.get("peak_bytes_in_use")
    return {
        "peak_rss_mib": peak / 2**20 if sys.platform == "darwin" else peak / 2**10,
        "peak_device_mib": None if held is None else held / 2**20,
    }


def lines(record: Mapping[str, Any]) -> str:
    """What an offline benchmark says of its engine beside its own figures."""
    parts = [
        f"programs: {record['programs']}, compiled in {record['compile_seconds']:.1f} s before "
        f"the run; {record['compiles']} compiled during it",
        f"padding waste: {record['padding_waste']:.3f} of the rows",
        f"peak memory: {record['peak_rss_mib']:.0f} MiB",
    ]
    if record["peak_device_mib"] is not None:
        parts.append(f"of the device: {record['peak_device_mib']:.0f} MiB")
    for kind in ("compute", "bandwidth"):
        if (share := record.get(f"share_of_{kind}")) is not None:
            parts.append(f"share of the {kind} ceiling: {share:.3f}")
    return "\n".join(parts)


@dataclasses.dataclass(frozen=True, slots=True)
class Counters:
    """What an engine has counted so far; two of them tell what a run added."""

    compiles: int
    compile_seconds: float
    real_tokens: int
    padded_tokens: int
    steps: int

    @classmethod
    def of(cls, engine: Any) -> "Counters":
        """The counters now."""
        runner = engine.runner
        return cls(*(getattr(runner, field.name) for field in dataclasses.fields(cls)))

    def since(self, before: "Counters") -> dict[str, Any]:
        """Compilations and steps after `before`, and the share of padded rows in those steps."""
        real, padded = (
            self.real_tokens - before.real_tokens,
            self.padded_tokens - before.padded_tokens,
        )
        return {
            "compiles": self.compiles - before.compiles,
            "compile_seconds": self.compile_seconds - before.compile_seconds,
            "padding_waste": 1 - real / padded if padded else 0.0,
            "steps": self.steps - before.steps,
        }
