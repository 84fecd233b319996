"""Runs a `Transformer` over paged KV with plain block tables, for tests of models."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvjax.cache.pages import KVPages, KVView, PageLayout
from kvjax.models import Transformer, kv_spec

PAGE_SIZE = 16


class PagedRun:
    """Sequences of one model, each with its own pages, in an order that is not the sequence's.

    Every step is padded to `max_tokens`, so that whatever it holds compiles once.
    """

    def __init__(
        self, model: Transformer, *, num_seqs: int, max_len: int, max_tokens: int,
        kv_dtype: str = "float32", layout: PageLayout = "split",
    ) -> None:  # fmt: skip
        self.model, self.max_tokens = model, max_tokens
        self.spec = kv_spec(model.config, kv_dtype, PAGE_SIZE, layout, model.sharding.ways)
        per_seq = -(-max_len // PAGE_SIZE)
        sharding = model.sharding
        self.pages = KVPages.allocate(
            self.spec, num_seqs * per_seq + 1, sharding.pages if sharding.mesh else None
        )
        order = np.random.default_rng(0).permutation(num_seqs * per_seq).astype(np.int32) + 1
        self.tables = order.reshape(num_seqs, per_seq)
        self.lens = np.zeros(num_seqs, np.int32)

    def step(
        self, tokens: Mapping[int, Sequence[int] | np.ndarray], *, decode: bool = False
    ) -> dict[int, np.ndarray]:
        """Appends tokens to sequences; logits `[tokens, vocab]` of each. `decode`: one each."""
        batch = [(seq, np.asarray(new, np.int32)) for seq, new in tokens.items()]
        size = len(self.lens) if decode else self.max_tokens
        ids, positions, slots = (np.full(size, fill, np.int32) for fill in (0, 0, -1))
        starts = np.zeros(len(self.lens) + 1, np.int32)
        tables, kv_lens = np.zeros_like(self.tables), np.zeros_like(self.lens)
        spans, at = {}, 0
        for row, (seq, new) in enumerate(batch):
            index = np.arange(self.lens[seq], self.lens[seq] + len(new), dtype=np.int32)
            span = slice(at, at + len(new))
            ids[span], positions[span] = new, index
            table = self.tables[seq]
            slots[span] = table[index // PAGE_SIZE] * PAGE_SIZE + index % PAGE_SIZE
            tables[row], kv_lens[row] = table, index[-1] + 1
            starts[row + 1 :] = at = span.stop
            self.lens[seq], spans[seq] = index[-1] + 1, span
        logits = self._run(ids, positions, slots, starts, tables, kv_lens, decode)
        return {seq: logits[span] for seq, span in spans.items()}

    def _run(
        self, ids: Any, positions: Any, slots: Any, starts: Any, tables: Any, kv_lens: Any,
        decode: bool,
    ) -> np.ndarray:  # fmt: skip
        hi: Any = np.where(slots < 0, 0, positions + 1).astype(np.int32)
        lows: list[Any] = [np.maximum(0, hi - (g.window or hi.max())) for g in self.spec.groups]
        views = [
            KVView(
                write_slots=slots,
                visible_lo=lo,
                visible_hi=hi,
                block_tables=tables,
                kv_lens=kv_lens,
            )
            for lo in lows
        ]
        hidden, self.pages, _ = self.model.layers(
            self.model.embed(ids), self.pages, positions, starts, views,
            max_query_len=1 if decode else None,
        )  # fmt: skip
        return np.asarray(self.model.head(hidden))


def logits_in_one_step(model: Transformer, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Logits of whole sequences, computed together in one step."""
    total, longest = sum(map(len, ids)), max(map(len, ids))
    run = PagedRun(model, num_seqs=len(ids), max_len=longest, max_tokens=total)
    logits = run.step(dict(enumerate(ids)))
    return [logits[seq] for seq in range(len(ids))]
