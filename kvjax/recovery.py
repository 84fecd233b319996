"""Who broke the step: halves of the suspects are run apart until one is left."""

from collections.abc import Iterable

from kvjax.sequence import Sequence
from kvjax.step_plan import Portion


class Suspects:
    """Sequences of a failed step, in groups still to be tried. Empty in ordinary times.

    One group at a time is scheduled alone. Each member must get past the token it had reached when
    the step failed; then it is cleared. A group that fails is split in two.
    """

    def __init__(self) -> None:
        self._groups: list[dict[Sequence, int]] = []  # sequence -> tokens to get past

    @property
    def none(self) -> bool:
        """Whether nobody is suspected."""
        return not self._groups

    @property
    def under_test(self) -> frozenset[Sequence] | None:
        """The only sequences that may run now; None: all."""
        return frozenset(self._groups[0]) if self._groups else None

    def failed(self, involved: Iterable[Sequence], others: bool) -> Sequence | None:
        """Notes that a step with `involved` raised; returns the culprit once it is certain.

        `others`: sequences were in it that are over by now, and may have been the cause.
        """
        # Two steps may have been in flight, each one token further than the host knew.
        group = {sequence: len(sequence.tokens) + 1 for sequence in involved}
        if self._groups:
            self._groups.pop(0)  # the group under test is what failed
        if len(group) == 1 and not others:
            return next(iter(group))
        members = sorted(group, key=lambda sequence: sequence.order)
        half = len(members) // 2
        for part in (members[half:], members[:half]):
            if part:
                self._groups.insert(0, {sequence: group[sequence] for sequence in part})
        return None

    def passed(self, portions: Iterable[Portion]) -> None:
        """Clears the sequences that a good step took past the point of failure."""
        if not self._groups:
            return
        for portion in portions:
            target = self._groups[0].get(portion.sequence)
            if target is not None and portion.stop > target:
                self.drop(portion.sequence)
                if not self._groups:
                    return

    def drop(self, sequence: Sequence) -> None:
        """Takes a sequence that is over, or cleared, off every list."""
        for group in self._groups:
            group.pop(sequence, None)
        self._groups = [group for group in self._groups if group]


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
