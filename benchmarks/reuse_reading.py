"""What is read off one prompt under one method, and what an instrument that reads it offers."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from kvjax.benchmarks.corpora import Corpus, Generation, Item


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A method against the full prefill of the same ids, on one item.

    Args:
      kl_1: KL(full || method) in nats of the next token after the prompt.
      kl_answer: mean KL over the full prefill's greedy answer, teacher-forced (8 to 16 tokens,
        the first of them is that of `kl_1`).
      top1: both have the same most likely next token.
      agreement: share of the full prefill's greedy answer that the method's own greedy answer has
        at the same place.
      solved: the method's greedy answer is right (`corpora.solves`); None if no answer is gold.
      gold_logprob: log-probability of the gold answer's tokens after the prompt; None likewise.
      kv_deviation: per layer, mean over prompt tokens of (|K' - K|^2 + |V' - V|^2) relative to
        |K|^2 + |V|^2, at equal positions.
      computed_layer_tokens: prompt tokens that ran through a layer, summed over layers.
      total_layer_tokens: prompt tokens x layers.
      copied_tokens: tokens whose KV was moved from a store.
      stored_bytes_per_token: what the store holds for a passage (KV, patch, hidden states,
        scores), over its tokens; 0 for full prefill.
      prefill_s: wall time from prompt to first logits, warm.
      extra: further numbers of the method, by name; the table lists their means.
    """

    kl_1: float
    kl_answer: float
    top1: bool
    agreement: float
    solved: bool | None
    gold_logprob: float | None
    kv_deviation: tuple[float, ...]
    computed_layer_tokens: int
    total_layer_tokens: int
    copied_tokens: int
    stored_bytes_per_token: float
    prefill_s: float
    extra: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])

    def __post_init__(self) -> None:
        for name in ("kl_1", "kl_answer"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        if not self.kv_deviation:
            raise ValueError("kv_deviation must have a number per layer, got none")
        numbers = (
            *self.kv_deviation,
            self.prefill_s,
            self.gold_logprob or 0.0,
            *self.extra.values(),
        )
        if not all(map(math.isfinite, numbers)):
            raise ValueError("a reading holds a number that is not finite")
        if not 0 <= self.computed_layer_tokens <= self.total_layer_tokens:
            raise ValueError(
                f"computed_layer_tokens must be in [0, {self.total_layer_tokens}], "
                f"got {self.computed_layer_tokens}"
            )

    @property
    def computed_share(self) -> float:
        """Layer-tokens computed over all of them."""
        return self.computed_layer_tokens / self.total_layer_tokens

    @property
    def kv_middle(self) -> float:
        """KV deviation of the middle layer."""
        return self.kv_deviation[len(self.kv_deviation) // 2]

    @property
    def kv_early(self) -> float:
        """KV deviation of the second layer, the first that sees other passages."""
        return self.kv_deviation[min(1, len(self.kv_deviation) - 1)]

    def as_json(self) -> dict[str, Any]:
        """JSON values; `from_json` gives the reading back."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def from_json(fields: Mapping[str, Any]) -> Reading:
    """A reading from `as_json`. Raises `ValueError` for fields that are missing or too many."""
    try:
        return Reading(**{**fields, "kv_deviation": tuple(fields["kv_deviation"])})
    except (TypeError, KeyError) as error:
        raise ValueError(f"no reading: {error}") from error


class Instrument(Protocol):
    """Measures items with one model. `kvjax.benchmarks.reuse_measure.open_instrument` makes one."""

    def about(self) -> Mapping[str, Any]:
        """Model with the hash of its weights, dtype, device, versions: two runs with different ones
        are no one result."""
        ...

    def generate(self, prompts: Sequence[str], max_tokens: int) -> Sequence[Generation]:
        """Greedy continuations, ended by the model's end token."""
        ...

    def learns(self, method: str) -> bool:
        """Whether a method learns from prompts it has seen. It gets a pass over a corpus to itself:
        others would fill the store that it keeps what it learned in."""
        ...

    def begin(self, corpus: Corpus, methods: Sequence[str]) -> None:
        """Called before a pass over a corpus, also of a resumed run: empty the stores, warm up
        with `corpus.warm_up`. Nothing may be learned from `corpus.items` but their passages."""
        ...

    def measure(self, item: Item, method: str) -> Reading:
        """One reading. All methods of an item are asked for in a row, "full" first if it is among
        them; the same arguments give the same reading whatever was measured before."""
        ...


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value
