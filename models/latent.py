"""Multi-head latent attention in its absorbed form (DeepSeek-V2, arXiv 2405.04434, section 2.1).

The cache holds one head per token: the normed latent (`kv_lora_rank` channels) and the rotated
shared key (`qk_rope_head_dim`). Queries are carried into the latent space through the key half of
`kv_b_proj`; the attended latent comes back through its value half, so no key or value is expanded.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kvjax.cache.pages import KVView
from kvjax.models.layers import Linear, RMSNorm, attend
from kvjax.models.loading import Loader
from kvjax.models.rope import rotate
from kvjax.pallas_kernels import Pages, write_slots

_LATENT_NORM_EPS = 1e-6  # of the norms on latents, whatever the configuration says of the others


class LatentAttention(nnx.Module):
    """Latent attention over pages with one head of `kv_lora_rank + qk_rope_head_dim` channels."""

    def __init__(self, load: Loader, prefix: str, layer: int) -> None:
        c, m = load.config, load.config.latent
        assert m is not None
        hidden, heads = c.hidden_size, c.num_heads
        nope, rope, rank = m.qk_nope_head_dim, m.qk_rope_head_dim, m.kv_lora_rank
        per_head = (None, None, None)
        if m.q_lora_rank is None:
            self.q_a = self.q_a_norm = None
            q = load.get(f"{prefix}.q_proj.weight", heads * (nope + rope), hidden)
        else:
            q_a = load.get(f"{prefix}.q_a_proj.weight", m.q_lora_rank, hidden)
            bias = load.get(f"{prefix}.q_a_proj.bias", m.q_lora_rank) if c.qkv_bias else None
            self.q_a = Linear(load, q_a, (None, None), bias)
            self.q_a_norm = RMSNorm(
                load, f"{prefix}.q_a_layernorm.weight", m.q_lora_rank, _LATENT_NORM_EPS
            )
            q = load.get(f"{prefix}.q_b_proj.weight", heads * (nope + rope), m.q_lora_rank)
        self.q = Linear(load, q.reshape(heads, nope + rope, -1), per_head)
        kv_a = load.get(f"{prefix}.kv_a_proj_with_mqa.weight", rank + rope, hidden)
        bias = load.get(f"{prefix}.kv_a_proj_with_mqa.bias", rank + rope) if c.qkv_bias else None
        self.kv_a = Linear(load, kv_a, (None, None), bias)
        self.kv_a_norm = RMSNorm(load, f"{prefix}.kv_a_layernorm.weight", rank, _LATENT_NORM_EPS)
        kv_b = load.get(f"{prefix}.kv_b_proj.weight", heads * (nope + m.v_head_dim), rank)
        kv_b = kv_b.reshape(heads, nope + m.v_head_dim, rank).astype("float32")
        self.absorb_k = nnx.Param(load.vector(kv_b[:, :nope], per_head))  # [heads, nope, rank]
        self.absorb_v = nnx.Param(load.vector(kv_b[:, nope:], per_head))  # [heads, v, rank]
        o = load.get(f"{prefix}.o_proj.weight", hidden, heads * m.v_head_dim)
        bias = load.get(f"{prefix}.o_proj.bias", hidden) if c.o_bias else None
        self.o = Linear(load, o, (None, None), bias)
        self.nope, self.rank, self.scale = nope, rank, c.scale
        self.interleaved = c.rope.interleaved

    def __call__(
        self,
        x: Float[Array, "tokens hidden"],
        pages: Pages,
        cos_sin: Float[Array, "tokens 2 half"],
        query_starts: Array,
        view: KVView,
        max_query_len: int | None,
    ) -> tuple[Array, Pages]:
        """Writes the tokens' latents to their slots, then attends. Consumes `pages`."""
        q, latent, _ = self.project(x, cos_sin)
        pages = write_slots(pages, latent, None, view.write_slots)
        out = attend(
            q, pages, query_starts, view, scale=self.scale, value_width=self.rank,
            max_query_len=max_query_len,
        )  # fmt: skip
        out = _per_head(out, self.absorb_v[...])
        return self.o(out.reshape(x.shape[0], -1)), pages

    def project(
        self, x: Float[Array, "tokens hidden"], cos_sin: Float[Array, "tokens 2 half"]
    ) -> tuple[Array, Array, None]:
        """Queries in the latent space `[tokens, heads, rank + rope]`, and what is stored."""
        q = self.q(x if self.q_a is None or self.q_a_norm is None else self.q_a_norm(self.q_a(x)))
        q_rope = rotate(q[..., self.nope :], cos_sin, interleaved=self.interleaved)
        q_latent = _per_head(q[..., : self.nope], self.absorb_k[...].swapaxes(1, 2))
        kv = self.kv_a(x)
        k_rope = rotate(kv[:, None, self.rank :], cos_sin, interleaved=self.interleaved)
        latent = self.kv_a_norm(kv[:, : self.rank])[:, None]
        q = jnp.concatenate([q_latent, q_rope], axis=-1)
        return q, jnp.concatenate([latent, k_rope], axis=-1), None


def _per_head(x: Array, w: Array) -> Array:
    """`[tokens, heads, out]` from `[tokens, heads, in]` and `[heads, out, in]`, row-invariant."""
    rows = x.shape[0]
    if rows == 1:
        x = jnp.concatenate([x, x])
    y = jax.lax.dot_general(
        x, w, (((2,), (2,)), ((1,), (0,))), precision=jax.lax.Precision.HIGHEST
    )  # [heads, tokens, out]
    return y.swapaxes(0, 1)[:rows]
