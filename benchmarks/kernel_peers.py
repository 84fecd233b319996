"""Other implementations of attention, for the same work in the same run as ours.

A peer that cannot take part raises `NotCompared` with the reason, which goes into the results.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.benchmarks.kernel_cases import Heads, Subject, after, item_size, numbers


class NotCompared(Exception):
    """Why a peer has no number."""


def shapes(parameters: dict[str, Any]) -> tuple[int, int, int]:
    """Batch, queries per sequence and keys per sequence of a compared case."""
    if "tokens" in parameters:
        return 1, parameters["tokens"], parameters["tokens"]
    return parameters["batch"], 1, parameters["context"]


def subject(name: str, heads: Heads, parameters: dict[str, Any], dtype: str) -> Subject:
    """The peer `name` as a subject. Raises NotCompared."""
    return PEERS[name](heads, parameters, dtype)


def _costs(heads: Heads, parameters: dict[str, Any], dtype: str) -> tuple[float, float]:
    batch, queries, keys = shapes(parameters)
    item = item_size(dtype)
    moved = batch * (2 * heads.kv * keys + 2 * heads.q * queries) * heads.width * item
    pairs = keys if queries == 1 else queries * (queries + 1) // 2
    return moved, 4.0 * heads.q * heads.width * batch * pairs


def _dense(name: str, attend: Callable[..., Any]) -> Callable[..., Subject]:
    """A peer over contiguous `[batch, tokens, heads, width]` arrays, compiled by jax."""

    def build(heads: Heads, parameters: dict[str, Any], dtype: str) -> Subject:
        batch, queries, keys = shapes(parameters)
        q = jnp.asarray(numbers((batch, queries, heads.q, heads.width), dtype))
        k, v = (
            jnp.asarray(numbers((batch, keys, heads.kv, heads.width), dtype, i)) for i in (1, 2)
        )

        def step(constants: Any, carry: Any) -> Any:
            o = attend(carry[0], *constants, causal=queries > 1)
            return after(carry[0], o), o

        start = (q, jnp.zeros_like(q))
        jax.eval_shape(step, (k, v), start)
        return Subject(name, step, (k, v), start, *_costs(heads, parameters, dtype))

    return build


def _jax_attention(implementation: str) -> Callable[..., Any]:
    def attend(q: Any, k: Any, v: Any, *, causal: bool) -> Any:
        if implementation == "cudnn" and jax.default_backend() != "gpu":
            raise NotCompared(f"cuDNN needs a GPU, the platform is {jax.default_backend()}")
        made: Any = implementation
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=made)

    return attend


def _contiguous(heads: Heads, parameters: dict[str, Any], dtype: str) -> Subject:
    """Two products and a softmax over head-major contiguous KV: what paging is measured against."""
    batch, queries, keys = shapes(parameters)
    if queries > 1:
        raise NotCompared("contiguous: decode only; dot_product_attention is its prefill")
    group = heads.q // heads.kv
    q = jnp.asarray(numbers((batch, heads.kv, group, heads.width), dtype))
    k, v = (jnp.asarray(numbers((batch, heads.kv, keys, heads.width), dtype, i)) for i in (1, 2))

    def step(constants: Any, carry: Any) -> Any:
        k, v = constants
        q = carry[0]
        wide: dict[str, Any] = {"preferred_element_type": jnp.float32}
        scores = jnp.einsum("bhgd,bhtd->bhgt", q, k, **wide) * heads.width**-0.5
        p = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        o = jnp.einsum("bhgt,bhtd->bhgd", p, v, **wide)
        return after(q, o), o

    start = (q, jnp.zeros(q.shape, jnp.float32))
    return Subject("contiguous, XLA", step, (k, v), start, *_costs(heads, parameters, dtype))


def _torch(kind: str) -> Callable[..., Subject]:
    def build(heads: Heads, parameters: dict[str, Any], dtype: str) -> Subject:
        if importlib.util.find_spec("torch") is None:
            raise NotCompared("torch is not installed in this environment")
        import torch  # type: ignore[import-not-found]

        on_gpu = jax.default_backend() == "gpu"
        if on_gpu and not torch.cuda.is_available():
            raise NotCompared("the installed torch sees no GPU")
        batch, queries, keys = shapes(parameters)
        options: dict[str, Any] = {
            "dtype": getattr(torch, dtype), "device": "cuda" if on_gpu else "cpu",
        }  # fmt: skip
        q = torch.randn(batch, heads.q, queries, heads.width, **options)
        k, v = (torch.randn(batch, heads.kv, keys, heads.width, **options) for _ in "kv")
        if kind == "SDPA":
            attention = torch.nn.functional.scaled_dot_product_attention
            extra: dict[str, Any] = {"is_causal": queries > 1}
        else:
            from torch.nn.attention import (  # type: ignore[import-not-found]
                flex_attention as flex,
            )

            attention = torch.compile(flex.flex_attention)
            extra = {}
            if queries > 1:
                extra["block_mask"] = flex.create_block_mask(
                    lambda b, h, i, j: i >= j, None, None, queries, keys, device=options["device"]
                )

        def step(_: Any, carry: Any) -> Any:
            with torch.no_grad():
                return attention(q, k, v, enable_gqa=heads.q != heads.kv, **extra)

        return Subject(f"torch {kind}", step, None, None, *_costs(heads, parameters, dtype))

    return build


def _flashinfer(heads: Heads, parameters: dict[str, Any], dtype: str) -> Subject:
    if importlib.util.find_spec("flashinfer") is None:
        raise NotCompared("flashinfer is not installed in this environment")
    import flashinfer  # type: ignore[import-not-found]
    import torch  # type: ignore[import-not-found]

    if not torch.cuda.is_available():
        raise NotCompared("flashinfer needs a GPU that torch sees")
    batch, queries, keys = shapes(parameters)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": "cuda"}
    page, costs = 16, _costs(heads, parameters, dtype)
    if queries > 1:
        q = torch.randn(queries, heads.q, heads.width, **options)
        k, v = (torch.randn(keys, heads.kv, heads.width, **options) for _ in "kv")

        def whole(_: Any, carry: Any) -> Any:
            return flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True)

        return Subject("flashinfer", whole, None, None, *costs)
    per_seq = keys // page
    ints: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}
    space = torch.empty(2**27, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "HND")
    wrapper.plan(
        torch.arange(batch + 1, **ints) * per_seq,
        torch.randperm(batch * per_seq, device="cuda").to(torch.int32),
        torch.full((batch,), page, **ints),
        heads.q, heads.kv, heads.width, page, q_data_type=options["dtype"],
    )  # fmt: skip
    q = torch.randn(batch, heads.q, heads.width, **options)
    cache = torch.randn(batch * per_seq, 2, heads.kv, page, heads.width, **options)

    def step(_: Any, carry: Any) -> Any:
        return wrapper.run(q, cache)

    return Subject("flashinfer", step, None, None, *costs)


PEERS: dict[str, Callable[..., Subject]] = {
    "jax.nn, XLA": _dense("jax.nn, XLA", _jax_attention("xla")),
    "jax.nn, cuDNN": _dense("jax.nn, cuDNN", _jax_attention("cudnn")),
    "contiguous, XLA": _contiguous,
    "torch SDPA": _torch("SDPA"),
    "torch FlexAttention": _torch("FlexAttention"),
    "flashinfer": _flashinfer,
}
