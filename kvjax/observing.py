"""What a strategy keeps of a prompt that has just been computed, while its pages are there."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from kvjax.cache.chunks import ChunkStore, Variant, VariantKey
from kvjax.reuse.assemble import Assembly
from kvjax.reuse.attended import AttendedShape, attended_arguments
from kvjax.reuse.padding import pieces
from kvjax.reuse.report import ReuseReport
from kvjax.reuse.strategy import KV, Observed, Prompt, Strategy, context_hash
from kvjax.sequence import Sequence as Branch

# Slots, and how far keys are turned on -> keys and values, f32[layers, tokens, kv_heads, width].
ReadSlots = Callable[[np.ndarray, int | np.ndarray], KV]
# A program of a shape, and its arguments -> f32[layers, rows, parts], both padded.
Attend = Callable[[AttendedShape, tuple[np.ndarray, ...]], np.ndarray]


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """What observing needs of the device."""

    read: ReadSlots
    attend: Attend
    page_size: int
    pages_per_seq: int


def observes(strategy: Strategy | None) -> bool:
    """Whether a strategy wants to see computed prompts."""
    return strategy is not None and type(strategy).observe is not Strategy.observe


def observe(sequence: Branch, prompt: Prompt, store: ChunkStore, device: Device) -> None:
    """Shows a sequence, whose prompt is computed, to its strategy. Waits for the device."""
    request, assembly = sequence.request, sequence.assembly
    strategy: Strategy = request.strategy
    report: ReuseReport = request.report
    assert isinstance(assembly, Assembly)
    observed = Observed(
        prompt,
        assembly.exact_end if assembly.lineage != "exact" else prompt.num_tokens,
        report.fates,
        tuple((move.start, move.stop, move.variant) for move in assembly.moves),
    )
    bench = _Bench(observed, assembly.lineage, sequence.page_ids, store, device)
    strategy.observe(observed, bench)
    ran = bench.ran * report.num_layers
    request.report = dataclasses.replace(report, kept_layer_tokens=ran)


class _Bench:
    """`kvjax.reuse.strategy.Workbench` over one sequence's pages."""

    def __init__(
        self, observed: Observed, lineage: str, page_ids: list[int], store: ChunkStore,
        device: Device,
    ) -> None:  # fmt: skip
        self._observed, self._lineage, self._page_ids = observed, lineage, page_ids
        self._store, self._device = store, device
        self.ran = 0  # tokens

    def variants(self, salt: str | None, chunk: str) -> Mapping[str, Variant]:
        return self._store.variants(salt, chunk)

    def of(self, salt: str | None) -> Iterable[Variant]:
        return self._store.of(salt)

    def use(self, variant: Variant) -> None:
        self._store.use(variant)

    def discard(self, variant: Variant) -> None:
        self._store.discard(variant)

    def read(self, variant: Variant) -> KV:
        slots = variant.slots(0, variant.num_tokens, self._device.page_size)
        return self._device.read(slots, -variant.base)

    def read_prompt(self, start: int, stop: int) -> KV:
        at, size = np.arange(start, stop), self._device.page_size
        slots = np.asarray(self._page_ids, np.int32)[at // size] * size + at % size
        return self._device.read(slots, -start)

    def attended(self, start: int, stop: int, edges: Sequence[int]) -> np.ndarray:
        self.ran += stop - start
        found = []
        for part, size in pieces(stop - start):
            first, count = start + part.start, part.stop - part.start
            shape, arguments = attended_arguments(
                self._observed.prompt.tokens, first, first + count, tuple(edges), self._page_ids,
                self._device.pages_per_seq, size,
            )  # fmt: skip
            found.append(self._device.attend(shape, arguments)[:, :count, : len(edges) - 1])
        return np.concatenate(found, axis=1)

    def keep(self, number: int) -> Variant | None:
        prompt, size = self._observed.prompt, self._device.page_size
        segment = prompt.segments[number]
        context = prompt.tokens[: segment.start]
        lineage = "exact" if segment.stop <= self._observed.exact_end else self._lineage
        behind = context_hash(context) + ("" if lineage == "exact" else f"/{lineage}")
        key = VariantKey(prompt.salt, segment.chunk, behind)
        if (there := self._store.get(key)) is not None:
            return there
        variant = Variant(
            key=key,
            tokens=np.asarray(prompt.chunk_tokens(number), np.int64),
            base=segment.start,
            page_ids=self._page_ids[segment.start // size : -(-segment.stop // size)],
            first=segment.start % size,
            lineage=lineage,
            context_ids=context,
        )
        return variant if self._store.put(variant) else None
