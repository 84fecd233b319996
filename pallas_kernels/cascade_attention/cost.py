"""When a cascade pays: bytes with and without, from host integers; no jax.

Decode attention is bound by the keys and values that it reads (Hydragen, arXiv 2402.05099,
section 3), so the rule counts those, and what keeping and merging two partial states costs.
"""

from collections.abc import Sequence
from typing import NamedTuple


class CascadePlan(NamedTuple):
    """Groups of one batch, for `cascade_attention`, and what one layer reads and writes."""

    group_starts: list[int]  # ascending, from 0 to the number of sequences
    prefix_lens: list[int]  # indices shared by the sequences of each group
    plain_bytes: int  # with `paged_attention`
    cascade_bytes: int  # with `cascade_attention`

    @property
    def pays(self) -> bool:
        """Whether the cascade moves fewer bytes."""
        return self.cascade_bytes < self.plain_bytes


def plan_cascade(
    block_tables: Sequence[Sequence[int]],
    kv_lens: Sequence[int],
    page_size: int,
    *,
    token_bytes: int,
    state_bytes: int,
    num_queries: int = 1,
) -> CascadePlan:
    """Groups neighbours that share leading pages, where sharing saves bytes, and counts.

    Sequences that share a prefix must stand side by side; sorting by block table puts them so.
    Only whole pages count as shared, up to the shortest member.

    Args:
      block_tables: page ids of each sequence in its order; what is past its length is ignored.
      token_bytes: of one token's keys and values in one layer, scales included.
      state_bytes: of one query token's output and lse, float32: `4 * q_heads * (v_width + 1)`.
      num_queries: query tokens of each sequence: 1 when decoding.

    A plan whose prefixes are all 0 does not pay; `plan.pays` is the rule.
    """
    pages = [table[: -(-n // page_size)] for table, n in zip(block_tables, kv_lens, strict=True)]
    starts, prefixes = [0], []
    shared = 0  # pages that all sequences of the group at hand share
    for s in range(1, len(kv_lens) + 1):
        if s < len(kv_lens):
            first, members = starts[-1], s - starts[-1]
            common = min(_common(pages[first], pages[s]), min(kv_lens[first : s + 1]) // page_size)
            common = common if members == 1 else min(common, shared)
            if common and members * common >= (members - 1) * shared:
                shared = common
                continue
        prefixes.append(shared * page_size)
        starts.append(s)
        shared = 0
    plain, cascade = cascade_bytes(
        starts, prefixes, kv_lens, token_bytes=token_bytes, state_bytes=state_bytes * num_queries
    )
    return CascadePlan(starts, prefixes, plain, cascade)


def cascade_bytes(
    group_starts: Sequence[int],
    prefix_lens: Sequence[int],
    kv_lens: Sequence[int],
    *,
    token_bytes: int,
    state_bytes: int,
) -> tuple[int, int]:
    """Bytes of one layer's attention without and with the cascade, reading each key once.

    `state_bytes` is that of all query tokens of one sequence. Without: every sequence reads all its
    keys and writes one state. With: a group reads its prefix once, every sequence the rest, and two
    partial states are written, read and merged into one.
    """
    sequences, keys = len(kv_lens), sum(kv_lens)
    saved = sum(
        prefix * max(last - first - 1, 0)
        for prefix, first, last in zip(prefix_lens, group_starts, group_starts[1:], strict=False)
    )
    plain = keys * token_bytes + sequences * state_bytes
    return plain, (keys - saved) * token_bytes + 5 * sequences * state_bytes


def cascade_refusal(platform: str) -> str | None:
    """Why `cascade_attention` never pays on a platform, whatever the batch; None: it may."""
    if platform == "cpu":
        return (
            "paged_attention (cpu) reads a shared prefix once by itself; partial states round "
            "otherwise, so bits would depend on the batch"
        )
    return None


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading elements are equal, by slices: a decode step asks for it every time."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
