"""How an engine is set up, and the one place that reads the environment."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def cache_dir() -> Path:
    """Folder for what kvjax fetches and may fetch again; it need not exist yet.

    `KVJAX_CACHE_DIR` if set, else `kvjax` in `XDG_CACHE_HOME`, else in `~/.cache`.
    """
    if own := os.environ.get("KVJAX_CACHE_DIR"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "kvjax"


_SWITCHES = (
    "enable_prefix_caching", "deterministic", "overlap", "compilation_cache", "force_reuse",
)  # fmt: skip


def environment(names: Iterable[str]) -> dict[str, str]:
    """What `KVJAX_NAME` says, in upper case, for each of `names` that is set and not empty."""
    values = {name: os.environ.get(f"KVJAX_{name.upper()}") for name in names}
    return {name: value for name, value in values.items() if value}


KV_CACHE_DTYPES = ("auto", "float32", "bfloat16", "int8", "float8_e4m3fn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes and switches of one engine. Validated once; every message names value and limit."""

    dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    # "auto": float32 with float32 weights, else bfloat16; int8 and float8 have a scale per head
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "int8", "float8_e4m3fn"] = "auto"
    max_model_len: int | None = None  # tokens, prompt and output; None: the model's own context
    max_num_seqs: int = 8  # sequences in one step
    max_num_batched_tokens: int = 512  # tokens in one step
    page_size: int | None = None  # KV slots per page; None: 16 on a CPU, 64 on an accelerator
    kv_cache_memory: int | None = None  # bytes; None: by memory_utilization
    memory_utilization: float = 0.9  # of an accelerator's memory; on CPU KV takes 5 % of the host's
    enable_prefix_caching: bool = True
    eviction_policy: str = "lru"
    reuse: Any = None  # spec or `kvjax.reuse.Strategy` for prompts with chunks; None: exact only
    max_reuse_loss: float = 0.1  # nats per token that approximate reuse may cost (`reuse check`)
    min_reuse_agreement: float = 0.8  # share of full prefill's right answers that it has to keep
    force_reuse: bool = False  # also where it was measured to cost more, or not measured at all
    chunk_cache_share: float = 0.5  # of the KV pages, that stored chunks may take at most
    chunk_eviction_policy: str = "lru"
    deterministic: bool = False  # one row of float32 costs as much as two, and bits stop depending
    overlap: bool = True  # plan and dispatch the next step before this one's tokens are read
    compilation_cache: bool = True
    seed: int | None = None  # of requests that bring none; None: from the operating system

    def __post_init__(self) -> None:
        for name, least in (
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 16),
            ("page_size", 16),
            ("max_model_len", 2),
            ("kv_cache_memory", 1),
        ):
            value = getattr(self, name)
            if value is None and name in ("page_size", "max_model_len", "kv_cache_memory"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        size = self.page_size
        if size is not None and (size & (size - 1) or size > 256):
            raise ValueError(f"page_size must be a power of two in 16..256, got {size}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}"
            )
        if self.dtype not in ("float32", "bfloat16", "int8"):
            raise ValueError(f"dtype must be float32, bfloat16 or int8, got {self.dtype!r}")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ValueError(
                f"kv_cache_dtype must be one of {KV_CACHE_DTYPES}, got {self.kv_cache_dtype!r}"
            )
        share = self.memory_utilization
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"memory_utilization must be a number in (0, 1], got {share!r}")
        share = self.chunk_cache_share
        if not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"chunk_cache_share must be a number in [0, 1], got {share!r}")
        loss = self.max_reuse_loss
        if isinstance(loss, bool) or not isinstance(loss, int | float) or not loss >= 0:
            raise ValueError(f"max_reuse_loss must be a number of at least 0, got {loss!r}")
        share = self.min_reuse_agreement
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"min_reuse_agreement must be a number in [0, 1], got {share!r}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.seed is not None and not isinstance(self.seed, int):
            raise ValueError(f"seed must be an integer or None, got {self.seed!r}")

    def replaced(self, settings: Mapping[str, Any]) -> "EngineConfig":
        """A copy with some fields changed. Raises `ValueError` for a name that is no field."""
        names = sorted(field.name for field in dataclasses.fields(self))
        for name in settings:
            if name not in names:
                raise ValueError(f"unknown setting {name!r}; there are {names}")
        return dataclasses.replace(self, **settings)

    @property
    def kv_dtype(self) -> str:
        """What keys and values are kept as."""
        if self.kv_cache_dtype != "auto":
            return self.kv_cache_dtype
        return "float32" if self.dtype == "float32" else "bfloat16"


def host_memory() -> int:
    """Bytes of physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def one_of(setting: str, name: str, known: Mapping[str, T]) -> T:
    """What a setting names. Raises `ValueError` with all names for another."""
    if name not in known:
        raise ValueError(f"{setting} must be one of {sorted(known)}, got {name!r}")
    return known[name]
