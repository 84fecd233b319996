"""What a decoder needs to know about its architecture: frozen, hashable, validated once."""

import dataclasses
from typing import Literal

from kvjax.pallas_kernels import Activation


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding of one kind of layer. `scaling` follows Hugging Face's `rope_type` names."""

    theta: float = 10_000.0
    rotary_dim: int  # leading channels of a head that rotate; head_dim unless partial
    scaling: Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"] = "none"
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn, longrope: multiplies cos and sin
    mscale: float | None = None  # yarn (DeepSeek)
    mscale_all_dim: float | None = None  # yarn (DeepSeek)
    truncate: bool = True  # yarn: round the correction range to whole channels
    short_factor: tuple[float, ...] = ()  # longrope
    long_factor: tuple[float, ...] = ()  # longrope
    interleaved: bool = False  # pairs are (0,1)(2,3).. instead of (0,d/2)(1,d/2+1)..


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    kv_lora_rank: int
    q_lora_rank: int | None
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


_POSITIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
    "head_dim", "max_position",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer. Fields that an architecture does not use keep their default."""

    architecture: str  # key in kvjax.models.FAMILIES, e.g. "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int  # context length the checkpoint was made for
    norm_eps: float
    rope: RopeConfig
    local_rope: RopeConfig | None = None  # second base, for sliding layers (Gemma 3)
    windows: tuple[int | None, ...] = ()  # per layer; None = full attention; () = all full
    rotary_layers: tuple[bool, ...] = ()  # per layer; False = no rotary (SmolLM3); () = all rotary
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    activation: Activation = "silu"
    norm_plus_one: bool = False  # Gemma: weights are stored as w, applied as 1 + w
    post_norms: bool = False  # Gemma: norms after attention and after the MLP as well
    embed_scale: float = 1.0
    query_scale: float | None = None  # default head_dim ** -0.5
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    latent: LatentConfig | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not isinstance(self.norm_eps, int | float) or self.norm_eps < 0:
            raise ValueError(f"norm_eps must be a number of at least 0, got {self.norm_eps!r}")
        for token_id in (self.bos_token_id, *self.eos_token_ids):
            if token_id is not None and not isinstance(token_id, int):
                raise ValueError(f"bos and eos token ids must be integers, got {token_id!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        for name in ("windows", "rotary_layers"):
            value = getattr(self, name)
            if value and len(value) != self.num_layers:
                raise ValueError(f"{name} has {len(value)} entries for {self.num_layers} layers")

    def window(self, layer: int) -> int | None:
        """Sliding window of `layer` in tokens, the query's own included; None is full attention."""
        return self.windows[layer] if self.windows else None

    def rotates(self, layer: int) -> bool:
        """Whether `layer` applies rotary embedding."""
        return self.rotary_layers[layer] if self.rotary_layers else True

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale
