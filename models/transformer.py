"""The decoder every family is an instance of: `embed`, `layers(l0, l1)`, `head`.

It is split so that reuse can enter anywhere: a caller may run some layers for some rows. State
comes in and goes out (`KVPages`); nothing is kept in the modules but weights.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kvjax.cache.pages import KVGroup, KVKind, KVPages, KVSpec, KVView, PageLayout
from kvjax.models.config import ModelConfig, RopeConfig
from kvjax.models.latent import LatentAttention
from kvjax.models.layers import MLP, Attention, Linear, RMSNorm
from kvjax.models.loading import Loader
from kvjax.models.rope import rope_table
from kvjax.pallas_kernels import Pages


class Embedding(nnx.Module):
    """Token vectors; also the output matrix where a checkpoint ties the two."""

    def __init__(self, load: Loader) -> None:
        c = load.config
        table = load.get("model.embed_tokens.weight", c.vocab_size, c.hidden_size)
        self.table = Linear(load, table, ("vocab", None))
        self.multiplier = c.embed_scale

    def __call__(self, tokens: Int[Array, " tokens"]) -> Float[Array, "tokens hidden"]:
        """Float32 vectors of `tokens`."""
        return self.table.rows(tokens) * self.multiplier


class DecoderLayer(nnx.Module):
    """Attention and MLP, each behind a norm (and, in Gemma, before one) and a residual."""

    def __init__(self, load: Loader, layer: int) -> None:
        c = load.config
        prefix = f"model.layers.{layer}"

        def norm(name: str) -> RMSNorm:
            return RMSNorm(load, f"{prefix}.{name}.weight", c.hidden_size)

        attention = LatentAttention if c.latent else Attention
        self.attention = attention(load, f"{prefix}.self_attn", layer)
        self.mlp = MLP(load, f"{prefix}.mlp")
        self.before_attention = norm("input_layernorm")
        if c.post_norms:
            self.after_attention = norm("post_attention_layernorm")
            self.before_mlp = norm("pre_feedforward_layernorm")
            self.after_mlp = norm("post_feedforward_layernorm")
        else:
            self.after_attention = self.after_mlp = None
            self.before_mlp = norm("post_attention_layernorm")

    def __call__(
        self,
        x: Float[Array, "tokens hidden"],
        pages: Pages,
        cos_sin: Float[Array, "tokens 2 half"],
        query_starts: Array,
        view: KVView,
        max_query_len: int | None,
    ) -> tuple[Array, Pages]:
        """One layer. Consumes `pages`."""
        with jax.named_scope("attention"):
            out, pages = self.attention(
                self.before_attention(x), pages, cos_sin, query_starts, view, max_query_len
            )
            x = x + (out if self.after_attention is None else self.after_attention(out))
        with jax.named_scope("mlp"):
            out = self.mlp(self.before_mlp(x))
            x = x + (out if self.after_mlp is None else self.after_mlp(out))
        return x, pages


class Transformer(nnx.Module):
    """A decoder-only language model over paged KV."""

    def __init__(self, load: Loader) -> None:
        c = load.config
        self.config, self.sharding = c, load.sharding
        self.embedding = Embedding(load)
        self.blocks = nnx.List([DecoderLayer(load, layer) for layer in range(c.num_layers)])
        self.norm = RMSNorm(load, "model.norm.weight", c.hidden_size)
        if c.tie_embeddings:
            self.output = None
        else:
            w = load.get("lm_head.weight", c.vocab_size, c.hidden_size)
            self.output = Linear(load, w, ("vocab", None))
        self.rope = _rope_param(load, c.rope)
        self.local_rope = None if c.local_rope is None else _rope_param(load, c.local_rope)

    def embed(self, tokens: Int[Array, " tokens"]) -> Float[Array, "tokens hidden"]:
        """Hidden states before the first layer."""
        with jax.named_scope("embed"):
            return self.sharding.replicate(self.embedding(tokens))

    def layers(
        self,
        hidden: Float[Array, "tokens hidden"],
        pages: KVPages,
        positions: Int[Array, " tokens"],
        query_starts: Int[Array, " seqs_plus_1"],
        views: Sequence[KVView],
        *,
        l0: int = 0,
        l1: int | None = None,
        max_query_len: int | None = None,
        collect: Sequence[int] = (),
    ) -> tuple[Array, KVPages, tuple[Array, ...]]:
        """Runs layers `[l0, l1)` for the rows in `hidden`, writing their KV. Consumes `pages`.

        `positions` turn the rotary embedding; `views[g]` says where KV group `g` writes and what
        each row sees. Also returns the hidden states that enter each layer named in `collect`.
        A row that sees nothing is padding, and zero from here on: products of a CPU skip such rows
        behind the last other one.
        """
        hidden = jnp.where(views[0].visible_hi[:, None] > 0, hidden, 0.0)
        cos_sin = self.rope[...][positions]
        local = cos_sin if self.local_rope is None else self.local_rope[...][positions]
        group_of = kv_spec(self.config, "float32", 16).group_of
        kept, out = [], list(pages.layers)
        for layer in range(l0, self.config.num_layers if l1 is None else l1):
            if layer in collect:
                kept.append(hidden)
            graph, weights = nnx.split(self.blocks[layer])
            turn = local if self.config.window(layer) is not None else cos_sin
            view = views[group_of[layer]]
            hidden, out[layer] = _run_layer(
                graph, max_query_len, weights, hidden, out[layer], turn, query_starts, view
            )
        return hidden, KVPages(tuple(out)), tuple(kept)

    def project(
        self,
        layer: int,
        hidden: Float[Array, "tokens hidden"],
        positions: Int[Array, " tokens"],
    ) -> tuple[Array, Array, Array | None]:
        """Queries of `layer`, and its keys and values as they are stored, of the hidden states
        that enter it: what scores look at, and what restores KV from hidden states."""
        block = self.blocks[layer]
        turn = self._rope_of(layer)[positions]
        return block.attention.project(block.before_attention(hidden), turn)

    def turn(
        self, layer: int, shifts: Int[Array, " tokens"]
    ) -> tuple[Float[Array, "tokens half"], Float[Array, "tokens half"], int]:
        """Cosines and sines that move stored keys of `layer` by `shifts` positions, and the first
        channel they turn: what `reposition` takes.

        From the float64 table of positions, where `R(-n)` is the transpose of `R(n)`. An amplitude
        of that table (YaRN, longrope) is in the stored keys already, and is divided out.
        """
        c = self.config
        table = self._rope_of(layer)
        offset = c.latent.kv_lora_rank if c.latent else 0
        if not c.rotates(layer):
            no_turn = jnp.ones((shifts.shape[0], table.shape[2]), table.dtype)
            return no_turn, jnp.zeros_like(no_turn), offset
        amplitude = table[0, 0, 0]  # cos(0) times it
        turn = table[jnp.abs(shifts)] / amplitude
        return turn[:, 0], turn[:, 1] * jnp.sign(shifts)[:, None].astype(table.dtype), offset

    def _rope_of(self, layer: int) -> Array:
        """The rotary table of a layer: sliding layers may have a base of their own."""
        if self.local_rope is not None and self.config.window(layer) is not None:
            return self.local_rope[...]
        return self.rope[...]

    def head(self, hidden: Float[Array, "rows hidden"]) -> Float[Array, "rows vocab"]:
        """Float32 logits."""
        with jax.named_scope("head"):
            project = self.embedding.table if self.output is None else self.output
            logits = project(self.norm(hidden))
            if (cap := self.config.logit_soft_cap) is not None:
                logits = cap * jnp.tanh(logits / cap)
            return self.sharding.replicate(logits)


def _rope_param(load: Loader, rope: RopeConfig) -> nnx.Param:
    return nnx.Param(load.vector(rope_table(rope, load.num_positions), (None, None, None)))


@partial(jax.jit, static_argnums=(0, 1))
def _run_layer(graph, max_query_len, weights, hidden, pages, cos_sin, query_starts, view):
    """Layers of equal structure share this trace: 30 layers cost one."""
    return nnx.merge(graph, weights)(hidden, pages, cos_sin, query_starts, view, max_query_len)


def kv_spec(
    config: ModelConfig, dtype: str, page_size: int, layout: PageLayout = "split", shards: int = 1
) -> KVSpec:
    """What `config` keeps per token: one group of full (or latent) layers, one per window size."""
    by_window: dict[int | None, list[int]] = {}
    for layer in range(config.num_layers):
        by_window.setdefault(config.window(layer), []).append(layer)
    groups = []
    for window, layers in sorted(by_window.items(), key=lambda item: item[1][0]):
        kind: KVKind = "latent" if config.latent else "full" if window is None else "sliding"
        heads, k_width, v_width = config.num_kv_heads, config.head_dim, config.head_dim
        if config.latent:
            heads, v_width = 1, 0
            k_width = config.latent.kv_lora_rank + config.latent.qk_rope_head_dim
        groups.append(
            KVGroup(kind=kind, layers=tuple(layers), num_kv_heads=heads, k_width=k_width,
                    v_width=v_width, dtype=dtype, window=window)
        )  # fmt: skip
    return KVSpec(groups=tuple(groups), page_size=page_size, layout=layout, shards=shards)
