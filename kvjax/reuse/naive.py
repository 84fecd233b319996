"""Every chunk as it was encoded alone, and nothing run again: the baseline of all the others."""

import dataclasses
from typing import ClassVar

from kvjax.reuse.strategy import CanonicalChunks


@dataclasses.dataclass(frozen=True)
class Naive(CanonicalChunks):
    """Stored keys turned to their new positions, and only text without stored KV computed."""

    name: ClassVar[str] = "naive"


@dataclasses.dataclass(frozen=True)
class NaiveWithoutRotation(CanonicalChunks):
    """The same with keys left at the positions they were encoded for: wrong, as a control."""

    name: ClassVar[str] = "naive_no_rotation"
    rotates: ClassVar[bool] = False
