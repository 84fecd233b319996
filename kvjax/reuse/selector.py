"""A second, small model that says which tokens of a chunk a question attends to.

It has weights, pages and programs of its own and shares nothing with an engine but token ids. Each
chunk is encoded once, by itself, and its KV kept while there is room; a question then runs over it.
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from kvjax.cache.pages import KVPages, layout_for
from kvjax.cache.pool import PagePool
from kvjax.models import Transformer, kv_spec, load_model, model_config
from kvjax.models.checkpoint import open_checkpoint
from kvjax.models.tokenizers import Tokenizer, load_tokenizer
from kvjax.readout import padded, row_views
from kvjax.reuse.scores import Layer

DTYPE = "bfloat16"  # of its weights and its KV
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

    def scores(self, tokens: Sequence[int], question: Sequence[int]) -> np.ndarray:
        """How much each token of a chunk is attended to by a question that follows it, f32[tokens]:
        softmax over the chunk alone, in the mean over heads and the question's rows.

        What does not fit the context is cut: a question to its last tokens, a chunk into pieces.
        """
        question = tuple(question)[-(self.context // 2) :]
        room = self.context - len(question)
        with self._lock:
            found = [
                self._piece(tuple(tokens[at : at + room]), question)
                for at in range(0, len(tokens), room)
            ]
        return np.concatenate(found)

    def _piece(self, tokens: tuple[int, ...], question: tuple[int, ...]) -> np.ndarray:
        """The question is written behind the chunk's KV, into pages that are given back."""
        try:
            num_pages = -(-(len(tokens) + len(question)) // _PAGE_SIZE)
            held = self._chunk(tokens, num_pages)
            with self._pool.lease(num_pages - len(held)) as lease:
                arguments = self._arguments(question, len(tokens), [*held, *lease.pages])
                self._pages, sums = self._score(self._weights, self._pages, *arguments)
            return np.asarray(sums)[: len(tokens)]
        except BaseException:  # a program consumes the pages
            self._forget()
            raise

    def _chunk(self, tokens: tuple[int, ...], num_pages: int) -> list[int]:
        """Pages of a chunk's KV, with room left for `num_pages` in all."""
        held = self._held.get(tokens)
        if held is not None:
            self._held.move_to_end(tokens)
        missing = num_pages - (0 if held is None else len(held))
        while self._pool.num_free < missing:
            oldest = next(key for key in self._held if key != tokens)
            self._pool.release(self._held.pop(oldest))
        if held is None:
            held = self._pool.allocate(-(-len(tokens) // _PAGE_SIZE))
            self._held[tokens] = held
            arguments = self._arguments(tokens, 0, held)
            self._pages = self._encode(self._weights, self._pages, *arguments)
            self.num_encoded += 1
        return held

    def _arguments(self, tokens: Sequence[int], first: int, pages: Sequence[int]) -> Any:
        if self._pages is None:
            self._pages = KVPages.allocate(self._spec, self._pool.num_pages)
        ids = np.zeros(padded(len(tokens)), np.int32)
        table = np.zeros((1, 1 << (len(pages) - 1).bit_length()), np.int32)
        ids[: len(tokens)], table[0, : len(pages)] = tokens, pages
        return ids, np.int32(first), np.int32(len(tokens)), table

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
        self, weights: Any, pages: KVPages, ids, first, count, table
    ) -> tuple[KVPages, Array]:
        """Rows of the question, and what they attend to in the last layer."""
        model = self._model(weights)
        last = model.config.num_layers - 1
        index, starts, views = row_views(self._spec, len(ids), first, count, table, write=True)
        hidden, pages, _ = model.layers(model.embed(ids), pages, index, starts, views, l1=last)
        row = jnp.arange(len(ids))
        layer = Layer(
            model, last, pages.layers[last], views[self._spec.group_of[last]], hidden, index,
            ids=jnp.where(row < count, row, -1),
            indices=jnp.arange(table.shape[1] * _PAGE_SIZE),
            question=row < count, chunks=jnp.zeros((0, 2), jnp.int32),
            old=(hidden, None), new=(hidden, None),
        )  # fmt: skip
        whole = jnp.stack([jnp.zeros_like(first), first])
        sums = layer.columns(row < count, within=whole)
        return pages, sums / (model.config.num_heads * count)


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
