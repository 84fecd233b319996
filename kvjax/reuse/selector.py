"""A second, small model that says which tokens of a chunk a question attends to.

It has weights, pages and programs of its own and shares nothing with an engine but token ids. Each
chunk is encoded once, by itself, and its KV kept while there is room; a question then runs over all
chunks of a prompt at once.
"""

import dataclasses
import functools
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from kvjax.cache.pages import KVPages, KVView, layout_for
from kvjax.cache.pool import PagePool
from kvjax.models import Transformer, kv_spec, load_model, model_config
from kvjax.models.checkpoint import open_checkpoint
from kvjax.models.tokenizers import Tokenizer, load_tokenizer
from kvjax.readout import padded, row_views
from kvjax.reuse.scores import mass_of_rows

DTYPE = "bfloat16"  # of its weights and its KV
BATCH = 16  # chunks that a question is run over at once
CAPACITY = 8192  # tokens whose KV it keeps, a question's among them; never more than its context
_PAGE_SIZE = 64


class Selector:
    """Attention of a question's rows in the last layer, over each chunk by itself."""

    def __init__(self, model: Transformer, context: int, dtype: str = DTYPE) -> None:
        """`context`: tokens of a chunk and a question together, at most."""
        self.context = min(context, CAPACITY)
        num_pages = -(-CAPACITY // _PAGE_SIZE)
        self._spec = kv_spec(model.config, dtype, _PAGE_SIZE, layout_for(jax.default_backend()))
        self._graph, state = nnx.split(model)
        self._weights, self._tree = jax.tree.flatten(state)
        self._pool = PagePool(num_pages, _PAGE_SIZE)
        self._pages: KVPages | None = None
        self._held: OrderedDict[tuple[int, ...], list[int]] = OrderedDict()
        self._lock = threading.Lock()
        self.num_encoded = 0  # chunks run so far
        self._encode = jax.jit(self._run_encode, donate_argnums=1)
        self._score = jax.jit(self._run_score, donate_argnums=1)

    def scores(self, chunks: Sequence[Sequence[int]], question: Sequence[int]) -> list[np.ndarray]:
        """How much each token of each chunk is attended to by a question that follows it, f32:
        softmax over the chunk alone, in the mean over heads and the question's rows.

        What does not fit the context is cut: a question to its last tokens, a chunk into pieces.
        """
        question = tuple(question)[-(self.context // 2) :]
        room = self.context - len(question)
        cut = [[tuple(c[at : at + room]) for at in range(0, len(c), room)] for c in chunks]
        with self._lock:
            found: dict[tuple[int, ...], np.ndarray] = {}
            for batch in self._batches(dict.fromkeys(itertools.chain(*cut)), len(question)):
                found |= zip(batch, self._batch(batch, question), strict=True)
        return [np.concatenate([found[piece] for piece in pieces]) for pieces in cut]

    def _batches(
        self, pieces: Iterable[tuple[int, ...]], rows: int
    ) -> Iterator[list[tuple[int, ...]]]:
        """Pieces that a question is run over at once: all of them lie in the pages together."""
        batch: list[tuple[int, ...]] = []
        used = 0
        for piece in pieces:
            needed = _pages(len(piece) + rows)
            if batch and (len(batch) == BATCH or used + needed > self._pool.num_pages):
                yield batch
                batch, used = [], 0
            batch.append(piece)
            used += needed
        if batch:
            yield batch

    def _batch(
        self, pieces: Sequence[tuple[int, ...]], question: tuple[int, ...]
    ) -> list[np.ndarray]:
        """The question is written behind each chunk's KV, into pages that are given back."""
        try:
            sizes = [_pages(len(piece) + len(question)) for piece in pieces]
            held = [self._chunk(piece, sum(sizes), pieces) for piece in pieces]
            missing = [size - len(pages) for size, pages in zip(sizes, held, strict=True)]
            with self._pool.lease(sum(missing)) as lease:
                spare = iter(lease.pages)
                tables = [
                    [*pages, *itertools.islice(spare, more)]
                    for pages, more in zip(held, missing, strict=True)
                ]
                arguments = self._questions(question, [len(p) for p in pieces], tables)
                self._pages, sums = self._score(self._weights, self._pages, *arguments)
            sums = np.asarray(sums)
            return [sums[number, : len(piece)] for number, piece in enumerate(pieces)]
        except BaseException:  # a program consumes the pages
            self._forget()
            raise

    def _chunk(
        self, tokens: tuple[int, ...], most: int, keep: Sequence[tuple[int, ...]]
    ) -> list[int]:
        """Pages of a chunk's KV; others than `keep` leave until these can have `most` in all."""
        held = self._held.get(tokens)
        if held is not None:
            self._held.move_to_end(tokens)
        there = sum(len(self._held.get(key, ())) for key in keep)
        while self._pool.num_free + there < most:
            oldest = next(key for key in self._held if key not in keep)
            self._pool.release(self._held.pop(oldest))
        if held is None:
            held = self._pool.allocate(_pages(len(tokens)))
            self._held[tokens] = held
            arguments = self._arguments(tokens, 0, held)
            self._pages = self._encode(self._weights, self._pages, *arguments)
            self.num_encoded += 1
        return held

    def _arguments(self, tokens: Sequence[int], first: int, pages: Sequence[int]) -> Any:
        if self._pages is None:
            self._pages = KVPages.allocate(self._spec, self._pool.num_pages)
        ids = np.zeros(padded(len(tokens)), np.int32)
        table = np.zeros((1, _power(len(pages))), np.int32)
        ids[: len(tokens)], table[0, : len(pages)] = tokens, pages
        return ids, np.int32(first), np.int32(len(tokens)), table

    def _questions(
        self, question: Sequence[int], firsts: Sequence[int], tables: Sequence[Sequence[int]]
    ) -> Any:
        """One question behind each of several chunks, of the lengths `firsts`."""
        count, seqs = len(question), _power(len(firsts))
        ids = np.zeros(padded(count), np.int32)
        first, table = (
            np.zeros(seqs, np.int32),
            np.zeros((seqs, _power(max(map(len, tables)))), np.int32),
        )
        ids[:count], first[: len(firsts)] = question, firsts
        for number, pages in enumerate(tables):
            table[number, : len(pages)] = pages
        return ids, first, np.int32(count), np.int32(len(firsts)), table

    def _forget(self) -> None:
        for pages in self._held.values():
            self._pool.release(pages)
        self._held.clear()
        self._pages = None

    # ---- programs ---------------------------------------------------------------------------

    def _model(self, weights: Any) -> Transformer:
        return nnx.merge(self._graph, jax.tree.unflatten(self._tree, weights))

    def _run_encode(self, weights: Any, pages: KVPages, ids, first, count, table) -> KVPages:
        model = self._model(weights)
        index, starts, views = row_views(self._spec, len(ids), first, count, table, write=True)
        return model.layers(model.embed(ids), pages, index, starts, views)[1]

    def _run_score(
        self, weights: Any, pages: KVPages, ids, first, count, chunks, table
    ) -> tuple[KVPages, Array]:
        """Rows of the question behind each chunk, and what they attend to in the last layer:
        f32[seqs, keys]."""
        model = self._model(weights)
        last, seqs = model.config.num_layers - 1, table.shape[0]
        row = jnp.arange(len(ids) * seqs)
        seq, at = jnp.minimum(row // count, seqs - 1), row % count
        real = row < chunks * count
        index = jnp.where(real, first[seq] + at, 0)
        slots = table[seq, index // _PAGE_SIZE] * _PAGE_SIZE + index % _PAGE_SIZE
        hi = jnp.where(real, index + 1, 0)
        starts = jnp.minimum(jnp.arange(seqs + 1), chunks) * count
        views = tuple(
            KVView(
                write_slots=jnp.where(real, slots, -1),
                visible_lo=jnp.maximum(0, hi - group.window) if group.window else 0 * hi,
                visible_hi=hi,
                block_tables=table,
                kv_lens=jnp.where(jnp.arange(seqs) < chunks, first + count, 0),
            )
            for group in self._spec.groups
        )
        hidden, pages, _ = model.layers(model.embed(ids[at]), pages, index, starts, views, l1=last)
        view = views[self._spec.group_of[last]]
        within = jnp.minimum(view.visible_hi, first[seq])  # the chunk alone
        view = dataclasses.replace(
            view, visible_lo=jnp.minimum(view.visible_lo, within), visible_hi=within
        )
        mass = mass_of_rows(model, last, pages.layers[last], view, hidden, index, starts=starts)
        return pages, mass.columns / (model.config.num_heads * count)


def _pages(tokens: int) -> int:
    return -(-tokens // _PAGE_SIZE)


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


@functools.lru_cache(maxsize=2)
def load_selector(name: str) -> Selector:
    """The model of that name (as `LLM` takes it), loaded at the first call and kept.

    Raises:
      ModelNotFound, UnsupportedModel, CorruptWeights: see `kvjax.errors`.
    """
    checkpoint = open_checkpoint(name)
    config = model_config(checkpoint.config)
    context = min(config.max_position, CAPACITY)
    model = load_model(config, checkpoint.tensors, dtype=DTYPE, num_positions=context)
    return Selector(model, context)


def selector_tokenizer(name: str, ours: Tokenizer) -> Tokenizer | None:
    """The tokenizer of the model of that name; None if it reads the ids of `ours`. No weights are
    loaded.

    Raises:
      ModelNotFound, TokenizerNotFound: see `kvjax.errors`.
    """
    theirs = _tokenizer(name)
    if theirs.fingerprint == ours.fingerprint:
        return None
    size = theirs.vocab_size
    same = size == ours.vocab_size and all(
        theirs.token_bytes(token) == ours.token_bytes(token) for token in range(size)
    )
    return None if same else theirs


_tokenizer = functools.lru_cache(maxsize=2)(lambda name: load_tokenizer(open_checkpoint(name)))
