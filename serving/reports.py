"""How the KV of the last prompts came about: what `/v1/kv/requests` tells and `/ui` colours."""

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvjax.request import RequestOutput
from kvjax.reuse.report import Fate, ReuseReport

FATES = tuple(fate.name.lower() for fate in Fate)  # by number
Decode = Callable[[list[int]], str]


@dataclasses.dataclass(frozen=True)
class _Kept:
    """One answer: the prompts of it that are over, by number."""

    time: float
    prompts: dict[int, tuple[np.ndarray, int, ReuseReport]]  # ids i32[n], cached tokens

    @property
    def num_tokens(self) -> int:
        """Of all prompts; a report keeps about as many bytes as fates in all layer groups."""
        return sum(ids.size + report.fates.size for ids, _, report in self.prompts.values())


class Reports:
    """Reports on the last answers of each tenant, the oldest forgotten first. For the event loop's
    thread."""

    def __init__(self, most: int = 64, max_tokens: int = 1 << 20) -> None:
        """`most` answers and `max_tokens` tokens of one tenant."""
        self._most, self._max_tokens = most, max_tokens
        self._kept: dict[str, dict[str, _Kept]] = collections.defaultdict(dict)

    def add(self, tenant: str, answer_id: str, prompt: int, output: RequestOutput) -> None:
        """Keeps what is known of one prompt of an answer."""
        own = self._kept[tenant]
        kept = own.setdefault(answer_id, _Kept(time.time(), {}))
        ids = np.asarray(output.prompt_token_ids, np.int32)
        report = output.reuse or prefix_report(ids.size, output.num_cached_tokens)
        kept.prompts[prompt] = ids, output.num_cached_tokens, report
        while len(own) > self._most or sum(k.num_tokens for k in own.values()) > self._max_tokens:
            del own[next(iter(own))]

    def list(self, tenant: str) -> list[dict[str, Any]]:
        """A tenant's answers, the newest first."""
        return [
            {
                "id": answer_id,
                "time": kept.time,
                "prompt_tokens": sum(ids.size for ids, _, _ in kept.prompts.values()),
                "cached_tokens": sum(cached for _, cached, _ in kept.prompts.values()),
            }
            for answer_id, kept in reversed(self._kept[tenant].items())
        ]

    def tell(self, tenant: str, answer_id: str, decode: Decode) -> dict[str, Any] | None:
        """All that is known of an answer; None if it is not a tenant's, or forgotten."""
        kept = self._kept[tenant].get(answer_id)
        if kept is None:
            return None
        prompts = sorted(kept.prompts.items())
        told = [{"index": i, **_told(*prompt, decode)} for i, prompt in prompts]
        return {"id": answer_id, "time": kept.time, "prompts": told}


def prefix_report(num_tokens: int, cached: int) -> ReuseReport:
    """The report on a prompt of which the first `cached` tokens were found, and no chunk was."""
    fates = np.full((1, num_tokens), Fate.COMPUTED, np.int8)
    fates[:, :cached] = Fate.EXACT
    return ReuseReport("prefix", ((0, 1),), fates)


def runs(fates: np.ndarray, names: Sequence[str] = FATES) -> list[tuple[int, int, str]]:
    """Runs of tokens with one fate, as `(start, end, its name)`."""
    ends = [0, *(np.flatnonzero(np.diff(fates)) + 1).tolist(), fates.size]
    return [(a, b, names[int(fates[a])]) for a, b in itertools.pairwise(ends) if a < b]


def _told(ids: np.ndarray, cached: int, report: ReuseReport, decode: Decode) -> dict[str, Any]:
    return {
        "prompt_tokens": ids.size,
        "cached_tokens": cached,
        "strategy": report.strategy,
        "copied_tokens": report.copied_tokens,
        "estimated_loss": report.estimated_loss,
        "layers": [
            {"start": group.l0, "end": group.l1, **{f: getattr(group, f) for f in FATES}}
            for group in report.groups
        ],
        "segments": [
            {"start": a, "end": b, "fate": fate, "text": decode(ids[a:b].tolist())}
            for a, b, fate in runs(report.fates[-1])
        ],
    }
