"""When requests are sent: all at once, at random, in a ramp, or as a trace says."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from kvjax.benchmarks.workloads import Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrivals:
    """A process of arrivals; names and meaning are those of `vllm bench serve`."""

    request_rate: float = math.inf  # per second; inf: all at once
    burstiness: float = 1.0  # shape of the gamma-distributed gaps: 1 is Poisson, less is burstier
    ramp_up_strategy: Literal["linear", "exponential"] | None = None
    ramp_up_start_rps: float = 1.0
    ramp_up_end_rps: float = 1.0
    self_timed: bool = False  # as the trace says

    def __post_init__(self) -> None:
        for name in ("request_rate", "burstiness", "ramp_up_start_rps", "ramp_up_end_rps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.ramp_up_strategy not in (None, "linear", "exponential"):
            raise ValueError(
                f"ramp_up_strategy: linear or exponential, not {self.ramp_up_strategy}"
            )
        if self.ramp_up_strategy and math.isfinite(self.request_rate):
            raise ValueError("a ramp has its own rates: leave request_rate out")

    def times(self, requests: Sequence[Request], seed: int) -> list[float]:
        """Seconds after the start at which each request is sent, ascending.

        Raises `ValueError` if they should come from a trace and a request has no time.
        """
        if self.self_timed:
            known = [r.at for r in requests if r.at is not None]
            if len(known) != len(requests):
                raise ValueError("self_timed needs a workload with time stamps: the trace")
            return sorted(known)
        rates = self.rates(len(requests))
        gaps = np.zeros(len(requests))
        if np.isfinite(rates).all():
            draws = np.random.default_rng([seed, 11]).gamma(self.burstiness, 1, len(requests))
            gaps = draws / (self.burstiness * rates)
        return [float(t) for t in np.cumsum(gaps)]

    def rates(self, count: int) -> np.ndarray:
        """Requests per second at each request; a ramp goes over the requests, first to last."""
        if self.ramp_up_strategy is None:
            return np.full(count, self.request_rate)
        share = np.arange(count) / max(count - 1, 1)
        first, last = self.ramp_up_start_rps, self.ramp_up_end_rps
        if self.ramp_up_strategy == "linear":
            return first + (last - first) * share
        return first * (last / first) ** share
