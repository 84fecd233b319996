"""Chunks of an engine: encoded when a prompt or a caller wants them, kept, pinned, counted.

    a prompt misses a chunk      a request of its own encodes it, and the prompt waits for that
    `put`                        the same ahead of time
    a prompt is scheduled        `assemble` says what the stored variants do for it

Only the thread that owns the engine may call this.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kvjax.cache.chunks import ChunkStats, ChunkStore, Variant, VariantKey, tokens_hash
from kvjax.errors import PromptTooLong, UnknownChunk
from kvjax.observing import Device, observe, observes
from kvjax.request import RequestMetrics, SamplingParams
from kvjax.reuse.assemble import Assembly, assemble
from kvjax.reuse.patches import Patches
from kvjax.reuse.restore import HIDDEN
from kvjax.reuse.strategy import (
    ModelFacts,
    Prompt,
    Segment,
    Strategy,
    Tokens,
    context_hash,
    variant_name,
)
from kvjax.schedule import Scheduler
from kvjax.sequence import Request, Status
from kvjax.sequence import Sequence as Branch

# Tokens of a sequence, the index of the first, its pages -> what enters each layer there.
ReadHidden = Callable[[list[int], int, list[int]], np.ndarray]


@dataclasses.dataclass(eq=False, slots=True)
class _Job:
    """A variant on its way."""

    key: VariantKey
    tokens: Tokens
    context: Tokens
    request: Request
    strategies: list[Strategy]  # whom it is for
    context_chunks: tuple[str, ...] = ()


class Chunks:
    """The chunk store of one engine, and the requests that fill it."""

    def __init__(
        self, store: ChunkStore, facts: ModelFacts, scheduler: Scheduler,
        discard: Callable[[Branch], None], max_model_len: int, device: Device,
        hidden: ReadHidden,
    ) -> None:  # fmt: skip
        self.store, self.facts = store, facts
        page_bytes = scheduler.pool.page_size * facts.kv_token_bytes
        self.patches = Patches(store, store.capacity_pages * page_bytes)
        self._scheduler, self._discard = scheduler, discard
        self._max_model_len, self._device, self._hidden = max_model_len, device, hidden
        self._jobs: dict[VariantKey, _Job] = {}
        self._waiting: list[tuple[Request, list[VariantKey]]] = []
        self._numbers = itertools.count()

    # ---- for callers ------------------------------------------------------------------------

    @property
    def stats(self) -> ChunkStats:
        """What is stored, and counts so far."""
        return self.store.stats

    def read(self, variant: Variant) -> tuple[np.ndarray, np.ndarray | None]:
        """Its keys and values, float32 `[layers, tokens, kv_heads, width]`, keys turned back to
        positions from 0; no values for a latent. Blocks until they are computed.

        Raises:
          UnknownChunk: it is not stored, or no longer, or not as KV.
        """
        if self.store.get(variant.key) is not variant or not variant.page_ids:
            raise UnknownChunk(f"no KV is stored for chunk {variant.key.chunk}")
        slots = variant.slots(0, variant.num_tokens, self._scheduler.pool.page_size)
        return self._device.read(slots, -variant.base)

    # ---- for the engine ---------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether prompts wait for chunks, or finished ones are to be stored."""
        return bool(self._waiting or self._jobs)

    def hold_back(self, request: Request) -> bool:
        """Starts encoding what `request` wants and does not find; whether it has to wait."""
        strategy: Strategy | None = request.strategy
        if strategy is None or not request.chunk_spans:
            return False
        prompt, keys = self.prompt(request, request.sequences[0].num_prompt, 0), []
        for number in range(len(prompt.segments)):
            context = strategy.wanted(prompt, number, self.store)
            if context is not None:
                tokens = prompt.chunk_tokens(number)
                key = self.encode(tokens, context, request.params.cache_salt, strategy, request)
                if key is not None:
                    keys.append(key)
        if keys:
            self._waiting.append((request, keys))
        return bool(keys)

    def encode(
        self, tokens: Tokens, context: Tokens, salt: str | None, strategy: Strategy,
        like: Request | None = None, context_chunks: tuple[str, ...] = (),
    ) -> VariantKey | None:  # fmt: skip
        """Queues the encoding of a variant; None if it is there, or will not be let in."""
        key = VariantKey(salt, tokens_hash(tokens), variant_name(strategy, context))
        if (variant := self.store.get(key)) is not None:
            strategy.annotate(variant, lambda: self._unrotated(variant))
            return None
        if key in self._jobs:
            self._jobs[key].strategies.append(strategy)
            return key
        total = len(context) + len(tokens)
        size = self._scheduler.pool.page_size
        hidden = strategy.keeps_hidden
        kept = len(tokens) if hidden else total
        if total >= self._max_model_len or not self.store.admits(-(-kept // size), on_host=hidden):
            return None
        params = SamplingParams(
            max_tokens=1, cache_salt=salt, priority=0 if like is None else like.params.priority
        )
        request = Request(
            request_id=f"chunk-{next(self._numbers)}",
            prompt_ids=(*context, *tokens),
            params=params,
            seed=0,
            metrics=RequestMetrics(arrival_time=self._scheduler.clock()),
            arrival=-1 if like is None else like.arrival,
            samples=False,
        )
        request.sequences.append(
            Branch(request, [*context, *tokens], num_prompt=total, keeps_pages=True)
        )
        self._jobs[key] = _Job(key, tokens, context, request, [strategy], context_chunks)
        self._scheduler.add(request.sequences[0])
        return key

    def keep_output(self, sequence: Branch, arrays: Mapping[str, np.ndarray] | None = None) -> int:
        """Stores what a parked sequence has generated as a chunk, with the KV that decoding wrote;
        how many variants: an output that ends in an end token is one also without it.

        The output of an approximate prompt is another variant than that of the exact one.
        `arrays` of one row per output token are kept with it.
        """
        output, start = sequence.output_ids, sequence.num_prompt
        assembly, salt = sequence.assembly, sequence.request.params.cache_salt
        lineage = "exact" if assembly is None else assembly.lineage
        context = tuple(sequence.tokens[:start])
        behind = context_hash(context) + ("" if lineage == "exact" else f"/{lineage}")
        ends = output[-1:] and output[-1] in sequence.end_token_ids
        stored = 0
        for tokens in (output, output[:-1]) if ends else (output,):
            count = min(len(tokens), sequence.num_computed - start)
            if count <= 0:
                continue
            size = self._scheduler.pool.page_size
            variant = Variant(
                key=VariantKey(salt, tokens_hash(tokens), behind),
                tokens=np.asarray(tokens[:count], np.int64),
                base=start,
                page_ids=sequence.page_ids[start // size : -(-(start + count) // size)],
                first=start % size,
                lineage=lineage,
                context_ids=context,
                tail=tokens[count:],
                facts={"born": "decode"},
                arrays={name: rows[:count] for name, rows in (arrays or {}).items()},
            )
            stored += self.store.put(variant)
        return stored

    def settle(self) -> list[Request]:
        """Stores what has been encoded; the prompts that waited for it and can go on."""
        for job in [job for job in self._jobs.values() if job.request.finished]:
            del self._jobs[job.key]
            (sequence,) = job.request.sequences
            if sequence.num_computed >= len(sequence.tokens):
                self._store(self._variant(job, sequence), job.strategies)
            self._discard(sequence)
        ready = [
            request
            for request, keys in self._waiting
            if request.finished or not any(key in self._jobs for key in keys)
        ]
        self._waiting = [entry for entry in self._waiting if entry[0] not in ready]
        return [r for r in ready if not r.finished]

    def _store(self, variant: Variant, strategies: Sequence[Strategy]) -> None:
        if self.store.put(variant):
            self.patches.attach(variant)
            for strategy in strategies:
                strategy.annotate(variant, lambda: self._unrotated(variant))

    def _unrotated(self, variant: Variant) -> tuple[np.ndarray, np.ndarray | None]:
        """Its KV as `kvjax.reuse.strategy.ReadKV` says. Waits for the device."""
        slots = variant.slots(0, variant.num_tokens, self._scheduler.pool.page_size)
        return self._device.read(
            slots, -(variant.base + np.arange(variant.num_tokens, dtype=np.int32))
        )

    def _variant(self, job: _Job, sequence: Branch) -> Variant:
        size, start = self._scheduler.pool.page_size, len(job.context)
        if job.strategies[0].keeps_hidden:  # all of them do, by the key
            hidden = self._hidden(list(job.tokens), start, sequence.page_ids)
            return Variant(
                key=job.key,
                tokens=np.asarray(job.tokens, np.int64),
                base=start,
                page_ids=[],
                first=0,
                lineage="exact" if hidden.dtype == np.float32 else f"hidden/{hidden.dtype}",
                context_ids=job.context,
                arrays={HIDDEN: hidden},
            )
        return Variant(
            key=job.key,
            tokens=np.asarray(job.tokens, np.int64),
            base=start,
            page_ids=list(sequence.page_ids[start // size :]),
            first=start % size,
            context_ids=job.context,
            context_chunks=job.context_chunks,
        )

    def prompt(self, request: Request, num_prompt: int, exact: int) -> Prompt:
        """What strategies see of a request."""
        ids = request.prompt_ids[:num_prompt]
        return Prompt(
            tokens=ids,
            segments=tuple(Segment(a, b, tokens_hash(ids[a:b])) for a, b in request.chunk_spans),
            salt=request.params.cache_salt,
            model=self.facts,
            num_exact=exact,
            options=request.params.extra_args or {},
        )

    def assemble(self, sequence: Branch, exact: int) -> Assembly | None:
        """How stored chunks serve a sequence; None: not at all."""
        request = sequence.request
        if request.strategy is None or sequence.num_prompt != len(request.prompt_ids):
            return None
        assembly = assemble(
            request.strategy, self.prompt(request, sequence.num_prompt, exact), self.store
        )
        for move in assembly.moves:
            if move.patch is not None:
                self.patches.use(move.variant, move.patch)
        return assembly

    def observe(self, sequence: Branch) -> None:
        """Shows a prompt that was just computed to its strategy, once. Waits for the device."""
        request = sequence.request
        if request.observed or sequence.assembly is None or not observes(request.strategy):
            return
        if sequence.status is Status.FINISHED or sequence.num_computed < sequence.num_prompt:
            return  # it is over, or has lost its pages meanwhile
        request.observed = True
        prompt = self.prompt(request, sequence.num_prompt, 0)
        if prompt.learns is not False:
            observe(sequence, prompt, self.store, self._device)

    def forget(self) -> None:
        """Drops all that is stored, on the host too."""
        self.store.clear()

    def put(
        self, tokens: Tokens, context: Tokens = (), salt: str | None = None,
        strategy: Strategy | None = None, context_chunks: tuple[str, ...] = (),
    ) -> bool:  # fmt: skip
        """Queues the encoding of a chunk ahead of any prompt; whether it is on its way or there.

        `strategy` annotates it once it is stored. `context_chunks`: `tokens_hash` of the chunks
        that the context consists of, if it does. Raises as `check` does.
        """
        self.check(tokens, context)
        strategy = strategy or Strategy()
        key = self.encode(tokens, context, salt, strategy, context_chunks=context_chunks)
        wanted = VariantKey(salt, tokens_hash(tokens), variant_name(strategy, context))
        return key is not None or self.store.get(wanted) is not None

    def check(self, tokens: Tokens, context: Tokens = ()) -> None:
        """Does nothing for what can be encoded.

        Raises:
          ValueError: there are no tokens.
          PromptTooLong: they do not fit the context.
        """
        if not tokens:
            raise ValueError("a chunk needs at least one token, got none")
        if len(context) + len(tokens) >= self._max_model_len:
            raise PromptTooLong(
                f"the chunk has {len(context) + len(tokens)} tokens with its context; "
                f"max_model_len={self._max_model_len} allows {self._max_model_len - 1}"
            )

    def is_encoding(self, key: VariantKey) -> bool:
        """Whether a variant is on its way."""
        return key in self._jobs


def queued(requests: Sequence[Request], chunks: Chunks) -> list[Request]:
    """A batch in the order in which its strategies want it queued. What one strategy serves keeps
    the places that it has in the batch; their arrivals are dealt out anew."""
    order = list(requests)
    places: dict[Strategy, list[int]] = {}
    for place, request in enumerate(requests):
        strategy = request.strategy if request.chunk_spans else None
        if strategy is not None and type(strategy).arrange is not Strategy.arrange:
            places.setdefault(strategy, []).append(place)
    for strategy, at in places.items():
        mine = [requests[place] for place in at]
        arrivals = sorted(request.arrival for request in mine)
        prompts = [chunks.prompt(r, len(r.prompt_ids), 0) for r in mine]
        for place, arrival, number in zip(at, arrivals, strategy.arrange(prompts), strict=True):
            order[place] = mine[number]
            mine[number].arrival = arrival
    return order
