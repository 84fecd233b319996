"""KV out of the device and back, bit for bit, whatever its pages look like on either side."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from kvjax.cache.pages import KVGroup, KVPages, KVSpec, storage_dtype
from kvjax.pallas_kernels import export_span, import_span
from kvjax.pallas_kernels.page_ops import KVSpan
from kvjax.reuse.padding import padded_slots, pieces

Spans = tuple[KVSpan, ...]  # one per layer


@dataclasses.dataclass(frozen=True)
class ExportShape:
    """The shape of one export program."""

    tokens: int

    def __str__(self) -> str:
        return f"export{self.tokens}"


@dataclasses.dataclass(frozen=True)
class ImportShape:
    """The shape of one import program."""

    tokens: int

    def __str__(self) -> str:
        return f"import{self.tokens}"


def export_slots(pages: KVPages, spec: KVSpec, slots: Int[Array, " tokens"]) -> Spans:
    """What every layer stores at `slots`; a slot of -1 gives zeros. Changes nothing."""
    spans = []
    for layer, held in enumerate(pages.layers):
        group = spec.groups[spec.group_of[layer]]
        spans.append(export_span(held, slots, widths=(group.k_width, group.v_width or None)))
    return tuple(spans)


def import_slots(pages: KVPages, spans: Spans, slots: Int[Array, " tokens"]) -> KVPages:
    """Stores exported spans at `slots`; a slot of -1 is dropped. Consumes `pages`."""
    layers = zip(pages.layers, spans, strict=True)
    return KVPages(tuple(import_span(held, span, slots) for held, span in layers))


def empty_spans(spec: KVSpec, num_tokens: int) -> Spans:
    """Spans of the right shapes, of numpy zeros."""
    return tuple(empty_span(spec.groups[group], num_tokens) for group in spec.group_of)


def empty_span(group: KVGroup, num_tokens: int) -> KVSpan:
    """The span of one layer of a group."""

    def numbers(width: int) -> np.ndarray | None:
        shape = (num_tokens, group.num_kv_heads, width)
        return np.zeros(shape, storage_dtype(group.dtype)) if width else None

    def scales(width: int) -> np.ndarray | None:
        there = width and group.scale_bytes
        return np.zeros((num_tokens, group.num_kv_heads), np.float32) if there else None

    k, v = numbers(group.k_width), numbers(group.v_width)
    return KVSpan(k, v, scales(group.k_width), scales(group.v_width))  # type: ignore[arg-type]


def export_pieces(call: Callable[..., Any], slots: np.ndarray) -> Spans:
    """`export_slots` of any number of slots, in numpy: `call(shape, slots)` runs a program."""
    parts = []
    for part, size in pieces(len(slots)):
        spans = call(ExportShape(size), padded_slots(slots[part], size))
        parts.append([_arrays(span, slice(part.stop - part.start)) for span in spans])
    return tuple(_joined(layer) for layer in zip(*parts, strict=True))


def import_pieces(spans: Spans, slots: np.ndarray) -> Iterator[tuple[np.ndarray, Spans]]:
    """Arguments of calls of import programs: slots, and padded spans in numpy."""
    for part, size in pieces(len(slots)):
        yield padded_slots(slots[part], size), tuple(_padded(span, part, size) for span in spans)


def _arrays(span: KVSpan, part: slice) -> KVSpan:
    """A part of a span's tokens, in numpy."""
    return _map(lambda array: np.asarray(array)[part], span)


def _padded(span: KVSpan, part: slice, size: int) -> KVSpan:
    rest = size - (part.stop - part.start)
    return _map(
        lambda array: np.pad(array, [(0, rest)] + [(0, 0)] * (array.ndim - 1)), _arrays(span, part)
    )


def _joined(parts: tuple[KVSpan, ...]) -> KVSpan:
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _map(change: Callable[[Any], Any], span: KVSpan) -> KVSpan:
    return jax.tree.map(change, span)
