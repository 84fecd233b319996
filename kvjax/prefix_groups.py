"""Which sequences of a decode step share a prefix, and whether reading it once for them pays.

Pure policy on host integers: the pages that block tables begin with, and the rule of
`plan_cascade`. Forks of one prompt and requests that hit the same prefix have leading pages in
common; who computed equal tokens by itself has not.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvjax.pallas_kernels import plan_cascade


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixGroups:
    """Rows of a step in an order that puts sharers side by side, cut into groups."""

    order: tuple[int, ...]  # sequences of the step, by their old places
    group_starts: tuple[int, ...]  # places in the new order, and their number
    prefix_lens: tuple[int, ...]  # indices that each group shares; 0: a loner

    def padded(self, num_seqs: int) -> tuple[Any, Any]:
        """Starts `i32[num_seqs + 1]` and prefixes `i32[num_seqs]`; who pads is a loner."""
        loners = range(len(self.order), num_seqs)
        starts = np.full(num_seqs + 1, num_seqs, np.int32)
        prefixes = np.zeros(num_seqs, np.int32)
        found = (*self.group_starts[:-1], *loners)
        starts[: len(found)] = found
        prefixes[: len(self.prefix_lens)] = self.prefix_lens
        return starts, prefixes


@dataclasses.dataclass(frozen=True, slots=True)
class CascadeRule:
    """The sizes that the rule weighs, all of one layer in bytes; see `plan_cascade`."""

    page_size: int
    token_bytes: int
    state_bytes: int

    def groups(self, page_ids: Sequence[list[int]], kv_lens: Sequence[int]) -> PrefixGroups | None:
        """Groups of a decode step whose cascade moves fewer bytes than the step without; or None.

        `page_ids[s]` are the pages of sequence `s` in its order, `kv_lens[s]` its length.
        """
        if len({pages[0] for pages in page_ids}) == len(page_ids):
            return None  # nobody shares
        order = sorted(range(len(page_ids)), key=lambda s: page_ids[s])
        plan = plan_cascade(
            [page_ids[s] for s in order],
            [kv_lens[s] for s in order],
            self.page_size,
            token_bytes=self.token_bytes,
            state_bytes=self.state_bytes,
        )
        if not plan.pays:
            return None
        return PrefixGroups(tuple(order), tuple(plan.group_starts), tuple(plan.prefix_lens))
