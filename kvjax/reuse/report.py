"""What became of every prompt token, layer group by layer group."""

import dataclasses
import enum
from collections.abc import Sequence

import numpy as np


class Fate(enum.IntEnum):
    """How a token's KV came about, in one layer."""

    EXACT = 0  # found, equal to what a full prefill writes
    SHIFTED = 1  # stored KV of the same tokens, moved
    PATCHED = 2  # moved, with a correction added
    RECOMPUTED = 3  # stored, but run again
    COMPUTED = 4  # there was nothing to reuse


@dataclasses.dataclass(frozen=True, slots=True)
class LayerGroup:
    """Tokens by fate in layers `[l0, l1)`."""

    l0: int
    l1: int
    exact: int
    shifted: int
    patched: int
    recomputed: int
    computed: int


@dataclasses.dataclass(frozen=True, slots=True)
class ReuseReport:
    """How a prompt's KV came about.

    `fates` is i8[groups, tokens] (`Fate`); `layers` are the groups' bounds, ascending.
    """

    strategy: str
    layers: tuple[tuple[int, int], ...]
    fates: np.ndarray
    copied_tokens: int = 0  # whose KV was moved into the request's own slots
    run_layer_tokens: int = 0  # layers times rows that were run, stages and probes included
    kept_layer_tokens: int = 0  # layers times rows that were run afterwards, for what was stored
    repaired_tokens: int = 0  # run again between decode steps, by now
    estimated_loss: float | None = None  # mean KL to full prefill that the model's gate measured

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """Counts by layer group."""
        return tuple(
            LayerGroup(l0, l1, *(int((row == fate).sum()) for fate in Fate))
            for (l0, l1), row in zip(self.layers, self.fates, strict=True)
        )

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return self.layers[-1][1]

    @property
    def num_tokens(self) -> int:
        """Of the prompt."""
        return self.fates.shape[1]

    @property
    def share_run(self) -> float:
        """Layer-tokens that were run, of those a full prefill runs."""
        return self.run_layer_tokens / (self.num_layers * self.num_tokens)

    def mean(self, fate: Fate) -> float:
        """Tokens of one fate, averaged over layers."""
        shares = [(self.fates[g] == fate).sum() * (b - a) for g, (a, b) in enumerate(self.layers)]
        return float(sum(shares)) / self.num_layers

    @property
    def exact(self) -> float:
        """Tokens found exactly, averaged over layers."""
        return self.mean(Fate.EXACT)

    @property
    def shifted(self) -> float:
        """Tokens moved, averaged over layers."""
        return self.mean(Fate.SHIFTED)

    @property
    def patched(self) -> float:
        """Tokens moved and corrected, averaged over layers."""
        return self.mean(Fate.PATCHED)

    @property
    def recomputed(self) -> float:
        """Tokens run again, averaged over layers."""
        return self.mean(Fate.RECOMPUTED)

    @property
    def computed(self) -> float:
        """Tokens without stored KV, averaged over layers."""
        return self.mean(Fate.COMPUTED)


def staged_report(
    report: ReuseReport, stages: Sequence[tuple[int, int, np.ndarray]]
) -> ReuseReport:
    """`report`, made before any row was chosen, once stages `(l0, l1, rows)` have run.

    Rows are indices of the prompt. The last pass says what is in the cache; every stage was work.
    """
    fates, groups, run = report.fates[0], [], report.run_layer_tokens
    start = max(i for i, (l0, _, _) in enumerate(stages) if i == 0 or l0 <= stages[i - 1][0])
    for l0, l1, rows in stages:
        run += (l1 - l0) * int((rows >= 0).sum())
    for l0, l1, rows in stages[start:]:
        row = fates.copy()
        rows = rows[rows >= 0]
        again = np.isin(row[rows], (Fate.SHIFTED, Fate.PATCHED))
        row[rows[again]] = Fate.RECOMPUTED
        groups.append(((l0, l1), row))
    return dataclasses.replace(
        report,
        layers=tuple(bounds for bounds, _ in groups),
        fates=np.stack([row for _, row in groups]),
        run_layer_tokens=run,
    )
