"""The device side of one step: what it is told (`StepBatch`), and the one function that is jitted.

A step's inputs travel as one int32 buffer: thirty small transfers would cost more than the host
plans in. `StepLayout` knows where each field lies, on the host (pack) and in the trace (unpack).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.cache.pages import KVPages, KVSpec, KVView
from kvjax.decode import DecodeState, SampleOutput, SamplingRows, pack_rows, sample
from kvjax.models import Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class StepBatch:
    """One step: T query tokens of S sequences, of which L rows give logits."""

    tokens: Array  # i32[T]
    token_source: Array  # i32[T] -1: `tokens[t]`; else the seat whose last sample is meant
    positions: Array  # i32[T] for the rotary embedding
    query_starts: Array  # i32[S + 1]
    logits_rows: Array  # i32[L] query token whose logits are wanted
    views: tuple[KVView, ...]  # one per KV group
    sampling: SamplingRows


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """The shapes of one compiled program."""

    tokens: int  # T
    seqs: int  # S
    rows: int  # L
    decode: bool  # every sequence brings one token
    cascade: bool = False  # what sequences share is read once for them

    def __str__(self) -> str:
        kind = (
            "cascade"
            if self.cascade
            else "decode"
            if self.decode
            else "score"
            if self.rows == self.tokens
            else "mixed"
        )
        return f"{kind}{self.tokens}"


class StepLayout:
    """Offsets of a `StepBatch`'s fields in its buffer, for one bucket."""

    def __init__(
        self, bucket: Bucket, spec: KVSpec, pages_per_seq: int, arguments: Mapping[str, float]
    ) -> None:
        self.bucket, self.arguments = bucket, dict(arguments)
        self._template = _template(bucket, spec, pages_per_seq, arguments)
        leaves, self._tree = jax.tree.flatten(self._template)
        self._shapes = [leaf.shape for leaf in leaves]
        self._dtypes = [leaf.dtype for leaf in leaves]
        sizes = [leaf.size for leaf in leaves]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self.size = int(self._starts[-1])

    def pack(self, batch: StepBatch) -> np.ndarray:
        """The buffer of a batch of numpy arrays."""
        buffer = np.empty(self.size, np.int32)
        for i, leaf in enumerate(jax.tree.leaves(batch)):
            assert leaf.shape == self._shapes[i], (i, leaf.shape, self._shapes[i])
            words = leaf.astype(np.int32) if leaf.dtype == np.bool_ else leaf.view(np.int32)
            buffer[self._starts[i] : self._starts[i + 1]] = words.ravel()
        return buffer

    def padding(self) -> StepBatch:
        """A batch of padding as numpy arrays: nothing is computed, nothing drawn."""
        return self._template

    def unpack(self, buffer: Array) -> StepBatch:
        """The batch, inside the trace."""
        leaves = []
        for i, (shape, dtype) in enumerate(zip(self._shapes, self._dtypes, strict=True)):
            words = buffer[self._starts[i] : self._starts[i + 1]].reshape(shape)
            if dtype == np.bool_:
                leaves.append(words != 0)
            else:
                leaves.append(jax.lax.bitcast_convert_type(words, dtype))
        return jax.tree.unflatten(self._tree, leaves)


def _template(
    bucket: Bucket, spec: KVSpec, pages_per_seq: int, arguments: Mapping[str, float]
) -> StepBatch:
    """A batch of the right shapes; padding everywhere."""
    t, s, rows = bucket.tokens, bucket.seqs, bucket.rows
    view = KVView(
        write_slots=ints(t, padding=-1),
        visible_lo=ints(t),
        visible_hi=ints(t),
        block_tables=ints(s, pages_per_seq),
        kv_lens=ints(s),
    )
    grouped = view
    if bucket.cascade:
        grouped = dataclasses.replace(
            view, group_starts=ints(s + 1, padding=s), prefix_lens=ints(s)
        )
    return StepBatch(
        tokens=ints(t),
        token_source=ints(t, padding=-1),
        positions=ints(t),
        query_starts=ints(s + 1),
        logits_rows=ints(rows),
        views=tuple(view if group.window is not None else grouped for group in spec.groups),
        sampling=pack_rows((), rows, 0, arguments),
    )


def ints(*shape: int, padding: int = 0) -> Any:
    """An int32 numpy array of padding; pytrees take it wherever a device array goes."""
    return np.full(shape, padding, np.int32)


def step(
    model: Transformer, pages: KVPages, state: DecodeState, batch: StepBatch, *, decode: bool
) -> tuple[KVPages, DecodeState, SampleOutput]:
    """One forward of all query tokens, one draw per logits row. Consumes `pages` and `state`."""
    on_device = state.last_tokens[jnp.maximum(batch.token_source, 0)]
    tokens = jnp.where(batch.token_source >= 0, on_device, batch.tokens)
    hidden = model.embed(tokens)
    hidden, pages, _ = model.layers(
        hidden, pages, batch.positions, batch.query_starts, batch.views,
        max_query_len=1 if decode else None,
    )  # fmt: skip
    logits = model.head(hidden[batch.logits_rows])
    _, state, out = sample(logits, state, batch.sampling)
    return pages, state, out
