"""Flax NNX modules that families share: linear maps, norms, attention over pages, gated MLP.

Hidden states are float32 `[tokens, hidden]`; matrices are `[..., in]` in the weight dtype.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from kvjax.cache.pages import KVView
from kvjax.models.loading import Loader
from kvjax.models.rope import rotate
from kvjax.models.sharding import Sharding
from kvjax.pallas_kernels import (
    Activation,
    Pages,
    Panels,
    cascade_attention,
    gate,
    gated_linear,
    linear,
    paged_attention,
    row_mean_square,
    write_slots,
)


class Linear(nnx.Module):
    """`x @ w.T + b`; `w` may have several output axes: `[*out, in]`. Float32 result.

    The weights are packed where a kernel wants them so, and lie as they are elsewhere.
    """

    def __init__(
        self,
        load: Loader,
        w,
        axes: tuple[str | None, ...],
        bias=None,
    ) -> None:
        weight, scale = load.weight(w, axes)
        self.shape = tuple(w.shape)
        self.packed = isinstance(weight, Panels)
        self.weight = nnx.Param(weight.words if isinstance(weight, Panels) else weight)
        self.scale = None if scale is None else nnx.Param(scale)
        self.bias = None if bias is None else nnx.Param(load.vector(bias, axes[:-1]))
        self.pad_single_row = load.deterministic or load.dtype != "float32"

    def __call__(self, x: Float[Array, "rows in_"]) -> Float[Array, "rows *out"]:
        """Applies the map to each row."""
        y = linear(x, self._weight, self._scale, pad_single_row=self.pad_single_row)
        return y if self.bias is None else y + self.bias[...]

    def gated(
        self, x: Float[Array, "rows in_"], activation: Activation
    ) -> Float[Array, "rows half"]:
        """`activation(y[:, 0]) * y[:, 1]` of `y = self(x)`, for weights `[2, half, in]`."""
        if self.bias is not None:
            y = self(x)
            return gate(y[:, 0], y[:, 1], activation)
        return gated_linear(
            x, self._weight, self._scale, activation=activation, pad_single_row=self.pad_single_row
        )

    def rows(self, ids: Int[Array, " n"]) -> Float[Array, "n in_"]:
        """Float32 weights of the output channels `ids`: a table's vectors."""
        w = self._weight
        rows = (w.rows(ids) if isinstance(w, Panels) else w[ids]).astype(jnp.float32)
        return rows if self.scale is None else rows * self.scale[...][ids][:, None]

    @property
    def _scale(self) -> Array | None:
        return None if self.scale is None else self.scale[...]

    @property
    def _weight(self) -> Array | Panels:
        w = self.weight[...]
        return Panels(w, self.shape) if self.packed else w


class RMSNorm(nnx.Module):
    """Root-mean-square norm (arXiv 1910.07467) over the last axis, row-invariant, in float32."""

    def __init__(self, load: Loader, name: str, width: int, eps: float | None = None) -> None:
        w = load.get(name, width).astype("float32")
        self.weight = nnx.Param(load.vector(w + 1 if load.config.norm_plus_one else w))
        self.eps = load.config.norm_eps if eps is None else eps

    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        """Normalises each row."""
        return x * jax.lax.rsqrt(row_mean_square(x) + self.eps) * self.weight[...]


class Attention(nnx.Module):
    """Grouped-query attention (arXiv 2305.13245). Queries, keys and values come of one product.

    The fused matrix is `[kv_heads, group + 2, head_dim, hidden]`: for each KV head its queries,
    its key and its value, so that splitting it by KV head splits all three alike.
    """

    def __init__(self, load: Loader, prefix: str, layer: int) -> None:
        c = load.config
        d, group = c.head_dim, c.num_heads // c.num_kv_heads
        rows = {"q": c.num_heads * d, "k": c.num_kv_heads * d, "v": c.num_kv_heads * d}

        def fused(kind: str, *columns: int) -> np.ndarray:
            parts = [load.get(f"{prefix}.{n}_proj.{kind}", rows[n], *columns) for n in rows]
            parts = [part.reshape(c.num_kv_heads, -1, d, *columns) for part in parts]
            return np.concatenate(parts, axis=1)

        qkv, biases = fused("weight", c.hidden_size), fused("bias") if c.qkv_bias else None
        self.qkv = Linear(load, qkv, ("kv_heads", None, None, None), biases)
        o = load.get(f"{prefix}.o_proj.weight", c.hidden_size, c.num_heads * d)
        o = o.reshape(c.hidden_size, c.num_kv_heads, group * d)
        self.o = OutputProjection(
            load, o, load.get(f"{prefix}.o_proj.bias", c.hidden_size) if c.o_bias else None
        )
        self.q_norm = RMSNorm(load, f"{prefix}.q_norm.weight", d) if c.qk_norm else None
        self.k_norm = RMSNorm(load, f"{prefix}.k_norm.weight", d) if c.qk_norm else None
        self.group = group
        self.scale, self.soft_cap = c.scale, c.attention_soft_cap
        self.rotates = c.rotates(layer)
        self.sharding = load.sharding

    def __call__(
        self,
        x: Float[Array, "tokens hidden"],
        pages: Pages,
        cos_sin: Float[Array, "tokens 2 half"],
        query_starts: Array,
        view: KVView,
        max_query_len: int | None,
    ) -> tuple[Array, Pages]:
        """Writes the tokens' KV to their slots, then attends. Consumes `pages`."""
        q, k, v = self.project(x, cos_sin)
        tokens, kv_heads, d = k.shape
        write_and_attend = partial(_write_and_attend, scale=self.scale, soft_cap=self.soft_cap,
                                   max_query_len=max_query_len)  # fmt: skip
        out, pages = _over_heads(self.sharding, write_and_attend, kv_heads)(
            q, k, v, pages, query_starts, view
        )
        return self.o(out.reshape(tokens, kv_heads, self.group * d)), pages

    def project(
        self, x: Float[Array, "tokens hidden"], cos_sin: Float[Array, "tokens 2 half"]
    ) -> tuple[Array, Array, Array | None]:
        """Queries `[tokens, q_heads, d]`, and keys and values as they are stored."""
        qkv = self.qkv(x)  # [tokens, kv_heads, group + 2, d]
        tokens, kv_heads, _, d = qkv.shape
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(qkv[:, :, : self.group]), self.k_norm(qkv[:, :, self.group])
            qk = jnp.concatenate([q, k[:, :, None]], axis=2)
        else:
            qk = qkv[:, :, : self.group + 1]
        if self.rotates:
            qk = rotate(qk, cos_sin)  # queries and keys in one operation
        q = qk[:, :, : self.group].reshape(tokens, kv_heads * self.group, d)
        return q, qk[:, :, self.group], qkv[:, :, self.group + 1]


class OutputProjection(nnx.Module):
    """`[tokens, kv_heads, group * d]` back to the hidden width, contracting heads and channels."""

    def __init__(self, load: Loader, w, bias) -> None:
        flat = w.reshape(w.shape[0], -1)
        self.linear = Linear(load, flat, (None, _if_splits(load, "kv_heads", w.shape[1])), None)
        self.bias = None if bias is None else nnx.Param(load.vector(bias))

    def __call__(self, x: Float[Array, "tokens heads d"]) -> Float[Array, "tokens hidden"]:
        """Applies the map to each token."""
        y = self.linear(x.reshape(x.shape[0], -1))
        return y if self.bias is None else y + self.bias[...]


class MLP(nnx.Module):
    """Gated MLP (arXiv 2002.05202), `down(activation(gate(x)) * up(x))`; gate and up as one."""

    def __init__(self, load: Loader, prefix: str) -> None:
        c = load.config
        h, i = c.hidden_size, c.intermediate_size
        names = ("gate_proj", "up_proj")
        gate_up = _stack([load.get(f"{prefix}.{n}.weight", i, h) for n in names])
        bias = _stack([load.get(f"{prefix}.{n}.bias", i) for n in names]) if c.mlp_bias else None
        down = load.get(f"{prefix}.down_proj.weight", h, i)
        down_bias = load.get(f"{prefix}.down_proj.bias", h) if c.mlp_bias else None
        self.gate_up = Linear(load, gate_up, (None, "mlp", None), bias)
        self.down = Linear(load, down, (None, "mlp"), down_bias)
        self.activation: Activation = c.activation

    def __call__(self, x: Float[Array, "tokens hidden"]) -> Float[Array, "tokens hidden"]:
        """Applies the MLP to each token."""
        return self.down(self.gate_up.gated(x, self.activation))


def _write_and_attend(
    q, k, v, pages, query_starts, view: KVView, *, scale, soft_cap, max_query_len
) -> tuple[Array, Pages]:
    pages = write_slots(pages, k, v, view.write_slots)
    out = attend(
        q, pages, query_starts, view, scale=scale, soft_cap=soft_cap, max_query_len=max_query_len
    )
    return out, pages


def attend(q: Array, pages: Pages, query_starts: Array, view: KVView, **options: Any) -> Array:
    """Attention over a view: as a cascade where it says who shares a prefix."""
    arguments = (q, pages, view.block_tables, query_starts, view.kv_lens, view.visible_lo,
                 view.visible_hi)  # fmt: skip
    if view.group_starts is None or view.prefix_lens is None:
        return paged_attention(*arguments, tail_mask=view.tail_mask, **options)
    return cascade_attention(
        *arguments, group_starts=view.group_starts, prefix_lens=view.prefix_lens,
        tail_mask=view.tail_mask, **options,
    )  # fmt: skip


def _over_heads(sharding: Sharding, fn, kv_heads: int):
    """`fn(q, k, v, pages, query_starts, view)` on each device's own heads, or as it is."""
    if sharding.mesh is None:
        return fn
    spec = sharding.spec((None, "kv_heads", None), (1, kv_heads, 1))
    pool = P(None, *spec[1:2])  # of every array of the pages: heads are their second axis
    return jax.shard_map(
        fn,
        mesh=sharding.mesh,
        in_specs=(spec, spec, spec, pool, P(), P()),
        out_specs=(spec, pool),
        check_vma=False,
    )


def _stack(arrays):
    return np.stack(arrays)


def _if_splits(load: Loader, axis: str, size: int) -> str | None:
    """`axis` where the mesh divides `size` of it (the flattened axis then splits alike)."""
    if load.sharding.mesh is None:
        return None
    return axis if load.sharding.spec((axis,), (size,))[0] else None
