"""`LLM.chunks`: documents encoded ahead of any prompt, kept, pinned, listed, saved and loaded.

For the thread that owns the engine; `kvjax.async_chunk_library` asks that thread.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvjax import chunk_saving
from kvjax.cache.chunks import ChunkStats, Variant, VariantKey, tokens_hash
from kvjax.chunk_saving import SavedChunks
from kvjax.engine import Engine
from kvjax.errors import OutOfPages, UnknownChunk
from kvjax.intake import Intake
from kvjax.progress import encoding_bar
from kvjax.request import Chunk
from kvjax.reuse import parse
from kvjax.reuse.patches import PatchStats
from kvjax.reuse.strategy import Document, context_hash, contexts, variant_name
from kvjax.segmentation import segment
from kvjax.transfer import Spans

Documents = str | Chunk | Sequence[str | Chunk]


class PutChunk(NamedTuple):
    """What became of a document that was put."""

    id: str  # of the chunk, for `pin`, `delete` and the like
    num_tokens: int
    stored: bool  # whether its KV is there; False: there was no room for it


class ChunkInfo(NamedTuple):
    """A stored chunk."""

    id: str
    token_ids: tuple[int, ...]
    variants: int  # how often its KV is stored, computed behind different contexts
    pages: int
    uses: int
    pinned: bool
    lineages: tuple[str, ...]  # of its variants: "exact", or what their context was made by


class LoadedChunks(NamedTuple):
    """What loading a file came to, in variants."""

    loaded: int
    present: int  # were stored already, and stayed
    refused: int  # there was no room for them
    corrupt: int  # did not fit their checksums, and were dropped
    locked: int  # are of salts that were not named


class _Job(NamedTuple):
    key: VariantKey
    num_tokens: int


class ChunkLibrary:
    """The stored chunks of one engine. A chunk is named by its id, or given as a `Chunk`."""

    def __init__(self, engine: Engine, intake: Intake, fingerprint: Callable[[], str]) -> None:
        """`fingerprint` of the weights; it may have to read them."""
        self._engine, self._intake, self._fingerprint = engine, intake, fingerprint
        self._about: dict[str, Any] | None = None

    def segment(self, text: str, max_tokens: int) -> tuple[Chunk, ...]:
        """A document as chunks of at most `max_tokens` tokens, which together are its tokens: cut
        at paragraphs, sentences or words. See `kvjax.segmentation`."""
        return segment(text, self._intake.tokenizer, max_tokens)

    def put(
        self,
        documents: Documents,
        *,
        strategy: Any = None,
        corpus: Sequence[str | Chunk] | None = None,
        parents: Sequence[Sequence[int]] | None = None,
        cache_salt: str | None = None,
        progress: bool = False,
    ) -> tuple[PutChunk, ...]:
        """Encodes documents, each behind the context that the strategy wants for it.

        That context is made from `corpus`, the documents themselves if it is None. `strategy` is a
        spec or a `Strategy`; the engine's own if it is None. Text is tokenised as a `Chunk` of it
        is. `parents`: for each document the numbers of those it refers to, for strategies that go
        by that; None: what they find in the texts. All documents are checked before any is encoded.

        Raises:
          ValueError: a document is empty, or has ids outside the vocabulary; `parents` are not one
            per document.
          PromptTooLong: one does not fit the context, together with what it is to stand behind.
        """
        jobs = waiting = self.begin(documents, strategy, cache_salt, corpus, parents)
        with encoding_bar(progress, len(jobs)) as encoded:
            while waiting:
                still = self.unfinished(waiting)
                encoded(len(waiting) - len(still), self._tokens(waiting) - self._tokens(still))
                waiting = still
                if waiting:
                    self._engine.step()
        return self.outcome(jobs)

    def begin(
        self, documents: Documents, strategy: Any = None, cache_salt: str | None = None,
        corpus: Sequence[str | Chunk] | None = None,
        parents: Sequence[Sequence[int]] | None = None,
    ) -> Sequence[_Job]:  # fmt: skip
        """Queues what `put` encodes; the engine's steps do it. Raises as `put` does."""
        parts = [documents] if isinstance(documents, str | Chunk) else list(documents)
        chosen = self._intake.reuse if strategy is None else parse(strategy)
        if parents is not None and len(parents) != len(parts):
            raise ValueError(f"{len(parents)} parents for {len(parts)} documents")
        mine = [
            self._document(part, None if parents is None else tuple(parents[number]))
            for number, part in enumerate(parts)
        ]
        among = mine if corpus is None else [self._document(part, None) for part in corpus]
        behind = contexts(chosen, mine, among)
        chunks = self._engine.chunks
        for document, context in zip(mine, behind, strict=True):
            chunks.check(document.tokens, context.tokens)
        jobs = []
        for document, context in zip(mine, behind, strict=True):
            chunks.put(
                document.tokens, context.tokens, cache_salt, chosen, context_chunks=context.chunks
            )
            name = variant_name(chosen, context.tokens)
            key = VariantKey(cache_salt, tokens_hash(document.tokens), name)
            jobs.append(_Job(key, len(document.tokens)))
        return jobs

    def _document(self, part: str | Chunk, parents: tuple[int, ...] | None) -> Document:
        text, ids, _ = self._intake.marked_tokens(
            [part if isinstance(part, Chunk) else Chunk(part)]
        )
        return Document(tuple(self._intake.checked_ids(ids)), text or "", parents)

    def unfinished(self, jobs: Sequence[_Job]) -> Sequence[_Job]:
        """Those of `begin` that are on their way."""
        return [job for job in jobs if self._engine.chunks.is_encoding(job.key)]

    def outcome(self, jobs: Sequence[_Job]) -> tuple[PutChunk, ...]:
        """What has become of each."""
        store = self._engine.chunks.store
        return tuple(
            PutChunk(key.chunk, num_tokens, store.get(key) is not None) for key, num_tokens in jobs
        )

    @staticmethod
    def _tokens(jobs: Sequence[_Job]) -> int:
        return sum(job.num_tokens for job in jobs)

    # ---- what is there ----------------------------------------------------------------------

    @property
    def stats(self) -> ChunkStats:
        """What is stored under any salt, and counts so far."""
        return self._engine.chunks.stats

    @property
    def patch_stats(self) -> PatchStats:
        """Patches of chunks (`LLM.condition`) under any salt, and counts so far."""
        return self._engine.chunks.patches.stats

    def list(self, cache_salt: str | None = None) -> tuple[ChunkInfo, ...]:
        """The chunks of one salt, in the order in which they were stored."""
        found: dict[str, list[Variant]] = {}
        for variant in self._engine.chunks.store:
            if variant.key.salt == cache_salt:
                found.setdefault(variant.key.chunk, []).append(variant)
        return tuple(
            ChunkInfo(
                id=chunk,
                token_ids=(*variants[0].tokens.tolist(), *variants[0].tail),
                variants=len(variants),
                pages=len({page for variant in variants for page in variant.page_ids}),
                uses=sum(variant.uses for variant in variants),
                pinned=any(variant.pins for variant in variants),
                lineages=tuple(dict.fromkeys(variant.lineage for variant in variants)),
            )
            for chunk, variants in found.items()
        )

    def read(
        self, chunk: str | Chunk, context: Sequence[int] = (), cache_salt: str | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Keys and values of a chunk as computed behind `context` (token ids), float32
        `[layers, tokens, kv_heads, width]`, keys turned back to positions from 0; no values where a
        latent is all there is. Waits for the device.

        Raises:
          UnknownChunk: that is not stored.
        """
        key = VariantKey(cache_salt, self.id_of(chunk), context_hash(tuple(context)))
        variant = self._engine.chunks.store.get(key)
        if variant is None:
            raise UnknownChunk(f"no KV is stored for chunk {key.chunk} behind that context")
        return self._engine.chunks.read(variant)

    def id_of(self, chunk: str | Chunk) -> str:
        """The id of a chunk; an id is returned as it is."""
        return tokens_hash(self._ids(chunk)) if isinstance(chunk, Chunk) else chunk

    # ---- who stays --------------------------------------------------------------------------

    def pin(self, chunk: str | Chunk, cache_salt: str | None = None) -> int:
        """Keeps a chunk from being evicted until it was unpinned as often; its variants.

        Raises:
          UnknownChunk: it is not stored.
        """
        return self._engine.chunks.store.pin(cache_salt, self.id_of(chunk))

    def unpin(self, chunk: str | Chunk, cache_salt: str | None = None) -> int:
        """Takes a `pin` back. Raises as `pin` does."""
        return self._engine.chunks.store.pin(cache_salt, self.id_of(chunk), by=-1)

    def delete(self, chunk: str | Chunk, cache_salt: str | None = None) -> int:
        """Forgets a chunk, pinned or not; how many variants it had. Raises as `pin` does."""
        store, chunk_id = self._engine.chunks.store, self.id_of(chunk)
        found = tuple(store.variants(cache_salt, chunk_id).values())
        if not found:
            raise UnknownChunk(f"no KV is stored for chunk {chunk_id}")
        for variant in found:
            store.discard(variant)
        return len(found)

    # ---- files ------------------------------------------------------------------------------

    def save(self, path: str | Path) -> int:
        """Writes every stored chunk to a file, with its KV bit for bit; how many variants.

        Chunks of every salt are in it, and no salt: `load` has to name them. The file replaces an
        older one, whole or not at all.

        Raises:
          ValueError: a strategy keeps something with a chunk that cannot be saved.
          OSError: the file cannot be written.
        """
        store = self._engine.chunks.store
        variants = sorted(store, key=lambda v: (v.pins > 0, v.last_use), reverse=True)
        spec = self._engine.spec
        chunk_saving.save(Path(path), self._identity(), variants, spec, self._export)
        return len(variants)

    def load(self, path: str | Path, cache_salts: Sequence[str] = ()) -> LoadedChunks:
        """Stores the chunks of a file, as far as there is room: pinned and newly used ones first.

        Those without a salt, and those that were saved under one of `cache_salts`.
        What a file brings never takes the place of what it brought before. A damaged chunk is
        dropped, with a warning, and encoded anew when a prompt wants it.

        Raises:
          CorruptChunks: the file is damaged where that concerns all chunks, or is no such file.
          ForeignChunks: its chunks hold for another model, KV type or tokenizer.
          FileNotFoundError: there is none.
        """
        loaded: list[Variant] = []
        present = refused = corrupt = locked = 0
        with SavedChunks(Path(path), self._identity(), self._engine.spec, cache_salts) as saved:
            try:
                for number in range(len(saved)):
                    if not saved.is_ours(number):
                        locked += 1
                        continue
                    found = saved.read(number)
                    if found is None:
                        corrupt += 1
                    elif self._engine.chunks.store.get(found[0].key) is not None:
                        present += 1
                    elif self._take(*found):
                        loaded.append(found[0])
                        found[0].pins += 1
                    else:
                        refused += 1
            finally:
                for variant in loaded:
                    variant.pins -= 1
        # The first were the last used when they were saved.
        clock = sorted((variant.last_use for variant in loaded), reverse=True)
        for variant, last_use in zip(loaded, clock, strict=True):
            variant.last_use = last_use
        return LoadedChunks(len(loaded), present, refused, corrupt, locked)

    def _export(self, variant: Variant) -> Spans:
        slots = variant.slots(0, variant.num_tokens, self._engine.spec.page_size)
        return self._engine.runner.export(slots)

    def _take(self, variant: Variant, spans: Spans | None) -> bool:
        """Stores a variant that has no pages yet, or needs none; False if there is no room."""
        store, size = self._engine.chunks.store, self._engine.spec.page_size
        if spans is None:
            return store.put(variant)
        count = -(-variant.num_tokens // size)
        if not store.admits(count):
            return False
        try:
            with self._engine.scheduler.lease(count) as lease:
                variant.page_ids = list(lease.pages)
                self._engine.load(spans, variant.slots(0, variant.num_tokens, size))
                if not store.put(variant):
                    return False
        except OutOfPages:
            return False
        self._engine.chunks.patches.attach(variant)  # which bounds those that it brings
        return True

    def _identity(self) -> dict[str, Any]:
        if self._about is None:
            self._about = chunk_saving.identity(
                self._fingerprint(), self._engine.config.dtype, self._engine.runner.config,
                self._engine.spec, self._intake.max_model_len, self._intake.tokenizer.fingerprint,
            )  # fmt: skip
        return self._about

    def _ids(self, chunk: Chunk) -> tuple[int, ...]:
        _, ids, _ = self._intake.marked_tokens([chunk])
        return tuple(self._intake.checked_ids(ids))
