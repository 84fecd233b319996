"""Patches made ahead of time: a marked prompt is encoded as a whole, and what that changes in each
chunk is kept with the chunk, in low rank."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from kvjax.cache.chunks import Variant, VariantKey
from kvjax.engine import Engine
from kvjax.intake import Intake
from kvjax.intake import Prompt as UserPrompt
from kvjax.request import SamplingParams
from kvjax.reuse.kamera import (
    Antecedents,
    Kamera,
    antecedents,
    low_rank_patch,
    orders,
    signed,
)
from kvjax.reuse.strategy import KV, Prompt, Strategy
from kvjax.sequence import Request

Run = Callable[[Sequence[Request]], Iterable[Request]]  # steps the engine until all are over


@dataclasses.dataclass(frozen=True, slots=True)
class Conditioned:
    """What making patches came to."""

    made: int
    found: int  # were there already
    refused: int  # chunks whose own KV the store did not let in, or whose patch found no room
    declined: int  # chunks whose patch would not be worth its bytes
    patch_bytes: int  # of those made, on the host
    kv_bytes: int  # of the stored KV that they correct
    joint_tokens: int  # of the prompts encoded as a whole; a prefix among them may be cached
    seconds: float  # that encoding them and making the patches took

    def break_even(self, full: float, reused: float) -> float:
        """Prompts after which what was made has paid for itself: seconds to the first token with a
        full prefill, and with patches. Infinite if they save nothing."""
        return self.seconds / (full - reused) if full > reused else math.inf


def condition(
    engine: Engine, intake: Intake, prompt: UserPrompt, strategy: Strategy, salt: str | None,
    run: Run,
) -> Conditioned:  # fmt: skip
    """Makes the patches of all chunks of `prompt` that stand behind something, unless they are
    there. For the thread that owns the engine.

    Raises:
      ValueError: no chunk is marked, or the strategy is not `Kamera`.
      PromptTooLong: the prompt does not fit the context.
    """
    if not isinstance(strategy, Kamera):
        raise ValueError(f"only kamera makes patches ahead of time, got {strategy.spec!r}")
    _, ids, spans = intake.marked_tokens(prompt)
    if not spans:
        raise ValueError("the prompt to condition marks no chunk")
    ids = intake.checked_ids(ids)
    request = intake.from_ids(ids, SamplingParams(cache_salt=salt))  # checked; never run itself
    request.chunk_spans = spans
    return _Conditioning(engine, intake, strategy, run).run(
        engine.chunks.prompt(request, len(ids), 0)
    )


class _Conditioning:
    def __init__(self, engine: Engine, intake: Intake, strategy: Kamera, run: Run) -> None:
        self._engine, self._intake, self._strategy, self._run = engine, intake, strategy, run
        self._joint_tokens = 0

    def run(self, prompt: Prompt) -> Conditioned:
        variants = self._canonical(prompt)
        missing: dict[int, Antecedents] = {}
        held: list[Variant] = []
        found = refused = declined = 0
        for number, variant in enumerate(variants):
            bound = antecedents(prompt, number)
            refused += variant is None
            if variant is None or bound.nothing:
                continue
            if self._strategy.patch_key(bound) in variant.facts:
                found += 1
            elif not self._is_worth(prompt, variant):
                declined += 1
            else:
                missing[number] = bound
                held.append(variant)
        start = time.perf_counter()
        try:
            for variant in held:  # joint encodings need pages too
                variant.pins += 1
            kept = self._make(prompt, missing, held)
        finally:
            for variant in held:
                variant.pins = max(0, variant.pins - 1)
        tokens = sum(variant.num_tokens for variant, _ in kept)
        return Conditioned(
            made=len(kept),
            found=found,
            refused=refused + len(held) - len(kept),
            declined=declined,
            patch_bytes=sum(num_bytes for _, num_bytes in kept),
            kv_bytes=tokens * prompt.model.kv_token_bytes,
            joint_tokens=self._joint_tokens,
            seconds=time.perf_counter() - start,
        )

    def _is_worth(self, prompt: Prompt, variant: Variant) -> bool:
        """Whether a patch takes less than the KV it corrects, and adding it less than projecting
        keys and values again would."""
        group, strategy = self._engine.spec.groups[0], self._strategy
        width = group.num_kv_heads * (group.k_width + group.v_width)
        taken = strategy.patch_bytes(
            variant.num_tokens, width, prompt.model.num_layers, np.dtype(self._dtype).itemsize
        )
        corrected = variant.num_tokens * prompt.model.kv_token_bytes
        return taken <= strategy.most * corrected and strategy.rank <= prompt.model.hidden_size

    @property
    def _dtype(self) -> type[np.floating]:
        """What patches are kept in: as exact as the KV."""
        return np.float32 if self._engine.spec.groups[0].dtype == "float32" else np.float16

    def _canonical(self, prompt: Prompt) -> list[Variant | None]:
        """Every chunk by itself, encoded where it is missing."""
        chunks = self._engine.chunks
        for number in range(len(prompt.segments)):
            chunks.put(prompt.chunk_tokens(number), (), prompt.salt)
        while chunks.busy:
            self._engine.step()
        keys = [VariantKey(prompt.salt, segment.chunk, "") for segment in prompt.segments]
        return [chunks.store.get(key) for key in keys]

    def _make(
        self, prompt: Prompt, missing: dict[int, Antecedents], held: Sequence[Variant]
    ) -> list[tuple[Variant, int]]:
        """Makes patches and keeps them with their chunks: those that found room, their bytes."""
        behind: dict[int, list[KV]] = {number: [] for number in missing}
        for order, numbers in self._joint_encodings(missing):
            tokens, starts = _arranged(prompt, order)
            at = [(starts[n], starts[n] + len(prompt.chunk_tokens(n))) for n in numbers]
            for number, kv in zip(numbers, self._encode(tokens, at, prompt.salt), strict=True):
                behind[number].append(kv)
        kept = []
        chunks, strategy = self._engine.chunks, self._strategy
        for (number, bound), variant in zip(missing.items(), held, strict=True):
            made = low_rank_patch(
                chunks.read(variant), _mean(behind[number]), strategy.rank, strategy.shallow,
                self._dtype,
            )  # fmt: skip
            patch = signed(made, variant.key.chunk, prompt.model.tag, bound)
            if chunks.patches.put(variant, strategy.patch_key(bound), patch):
                kept.append((variant, patch.num_bytes))
        return kept

    def _joint_encodings(
        self, missing: Iterable[int]
    ) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Orders of the first chunks to encode, and whose KV is read from each."""
        wanted: dict[tuple[int, ...], list[int]] = {}
        last = max(missing, default=-1)
        for number in missing:
            for order in orders(number, self._strategy.orbit):
                # As the prompt has it, one encoding serves every chunk.
                given = order == tuple(range(number))
                full = tuple(range(last + 1)) if given else (*order, number)
                wanted.setdefault(full, []).append(number)
        return [(order, tuple(numbers)) for order, numbers in wanted.items()]

    def _encode(
        self, tokens: list[int], spans: Sequence[tuple[int, int]], salt: str | None
    ) -> list[KV]:
        """KV of spans of a text, keys turned back to positions from 0."""
        request = self._intake.from_ids(
            tokens, SamplingParams(max_tokens=1, cache_salt=salt), samples=False
        )
        (sequence,) = request.sequences
        sequence.keeps_pages = True
        try:
            for _ in self._run([request]):
                pass
            if request.error is not None:
                raise request.error
            self._joint_tokens += len(tokens)
            size = self._engine.spec.page_size
            pages = np.asarray(sequence.page_ids, np.int32)
            found = []
            for start, stop in spans:
                at = np.arange(start, stop)
                slots = pages[at // size] * size + at % size
                found.append(self._engine.runner.read(slots, -start))
            return found
        finally:
            self._engine.discard(sequence)


def _arranged(prompt: Prompt, order: Sequence[int]) -> tuple[list[int], dict[int, int]]:
    """A prompt up to its last chunk of `order`, chunks in that order between the same texts; where
    each begins."""
    tokens: list[int] = []
    starts: dict[int, int] = {}
    at = 0
    for place, number in enumerate(order):
        tokens += prompt.tokens[at : prompt.segments[place].start]
        at = prompt.segments[place].stop
        starts[number] = len(tokens)
        tokens += prompt.chunk_tokens(number)
    return tokens, starts


def _mean(kvs: Sequence[KV]) -> KV:
    keys, values = zip(*kvs, strict=True)
    return np.mean(keys, axis=0), None if values[0] is None else np.mean(values, axis=0)
