"""The quality gate: approximate reuse serves a model that was measured to bear it.

`kvjax reuse check` measures a strategy against the same model's full prefill and keeps the verdict
in the cache folder, by weights, their type, KV type and strategy. A strategy with
`approximate=True` is refused without one, where its loss is above `EngineConfig.max_reuse_loss`,
and where its answers agree less than `EngineConfig.min_reuse_agreement`: a mean over distributions
can be small while the few tokens that matter are lost.
"""

import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from kvjax.errors import ReuseRefused
from kvjax.reuse.strategy import ModelFacts, Strategy


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a strategy was measured to cost one model."""

    strategy: str  # its spec
    loss: float  # mean KL(full prefill || reuse) over greedy answers, nats per token
    loss_interval: tuple[float, float]
    agreement: float  # share of full prefill's greedy answers that reuse gives too
    agreement_interval: tuple[float, float]
    agreement_of: str  # what was counted, such as "21 right answers"
    recovery: float | None  # 1 - loss / the loss of naive reuse; None if that is zero
    corpus: str
    corpus_digest: str
    items: int
    about: dict[str, Any]  # model, device, versions

    def __post_init__(self) -> None:
        if not isinstance(self.loss, int | float) or not (
            math.isfinite(self.loss) and self.loss >= 0
        ):
            raise ValueError(f"a loss must be finite and not negative, got {self.loss!r}")
        if not isinstance(self.agreement, int | float) or not 0 <= self.agreement <= 1:
            raise ValueError(f"an agreement must be in [0, 1], got {self.agreement!r}")

    def complaint(self, limits: "Limits") -> str | None:
        """Why the strategy may not serve, with the numbers and the limits; None: it may."""
        found = []
        if self.loss > limits.max_loss:
            found.append(
                f"loses {self.loss:.4f} nats per token; max_reuse_loss={limits.max_loss:g}"
            )
        if self.agreement < limits.min_agreement:
            found.append(
                f"keeps {self.agreement:.1%} of full prefill's {self.agreement_of}; "
                f"min_reuse_agreement={limits.min_agreement:g}"
            )
        return ", and ".join(found) or None


class Limits(NamedTuple):
    """What a verdict has to keep to: both."""

    max_loss: float
    min_agreement: float


class Verdicts:
    """Verdicts on one model with one type of weights and one of KV, a file each.

    `fingerprint` is asked for when a verdict is first read or written: it reads the weights.
    `length`: the longest sequence, for models whose rotary angles depend on it.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Callable[[], str],
        dtype: str,
        kv_dtype: str,
        length: int | None = None,
    ) -> None:
        self._folder, self._fingerprint = folder, fingerprint
        self._types, self._length = (dtype, kv_dtype), length

    def path(self, strategy: Strategy) -> Path:
        """Where the verdict on a strategy is kept."""
        model = self._fingerprint()
        key = json.dumps([model, *self._types, self._length, strategy.spec])
        digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        folder = "-".join((model[:16], *self._types))
        return self._folder / folder / f"{strategy.name}-{digest}.json"

    def read(self, strategy: Strategy) -> Verdict | None:
        """The verdict; None if there is none.

        Raises:
          ReuseRefused: the file is there and is no verdict.
        """
        path = self.path(strategy)
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            intervals = ("loss_interval", "agreement_interval")
            return Verdict(**{**fields, **{name: tuple(fields[name]) for name in intervals}})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise ReuseRefused(f"{path} is no verdict ({error}); measure it again") from error

    def write(self, strategy: Strategy, verdict: Verdict) -> Path:
        """Keeps a verdict in place of an older one; where."""
        path = self.path(strategy)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(verdict), file, indent=1)
        os.replace(name, path)
        return path


class Gate:
    """Lets strategies through to one model. `forced`: all of them, measured or not.

    `facts` of the model are what a strategy may refuse it by; None: it is not asked.
    """

    def __init__(
        self, verdicts: Verdicts, limits: Limits, *, forced: bool = False,
        facts: ModelFacts | None = None,
    ) -> None:  # fmt: skip
        self._verdicts, self._limits, self._forced = verdicts, limits, forced
        self._facts = facts
        self._losses: dict[str, float | None] = {}  # of what was let through

    def check(self, strategy: Strategy) -> None:
        """Does nothing for a strategy that may serve.

        Raises:
          ReuseRefused: it is approximate, and was measured to change too much, or not at all; or
            the model gains nothing by it.
        """
        if self._facts is not None and not self._forced:
            why = strategy.refusal(self._facts)
            if why is not None:
                raise ReuseRefused(f"{strategy.spec}: {why}; force_reuse=True does it all the same")
        if not strategy.approximate or strategy.spec in self._losses:
            return
        verdict = None
        try:
            verdict = self._verdicts.read(strategy)
        except ReuseRefused:
            if not self._forced:
                raise
        if not self._forced:
            self._refuse(strategy, verdict)
        self._losses[strategy.spec] = None if verdict is None else verdict.loss

    def loss(self, strategy: Strategy) -> float | None:
        """The measured loss of a strategy that was let through; None if it is not known."""
        return self._losses.get(strategy.spec)

    def _refuse(self, strategy: Strategy, verdict: Verdict | None) -> None:
        if verdict is None:
            raise ReuseRefused(
                f"{strategy.spec} is approximate and was not measured on this model: run "
                f"`kvjax reuse check MODEL --reuse {strategy.spec}`, or force_reuse=True"
            )
        if (complaint := verdict.complaint(self._limits)) is not None:
            raise ReuseRefused(
                f"{strategy.spec} on this model ({verdict.corpus}, {verdict.items} items) "
                f"{complaint}"
            )
