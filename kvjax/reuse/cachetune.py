"""CacheTune (arXiv 2605.24022): rows chosen once per chunk, by what is left of its KV at low
frequencies; how many, by how fast the rest comes over a link.

Offline, in every layer, keys before rotary positions and values are low-passed along the tokens;
a token scores half the sum of the norms of what is left. The scores stay with the chunk, so a
prompt runs its rows in ordinary steps.

Inferred: one set for all layers, from the mean score over layers (rows of a layer must have been
run below); the layers' scores as they are. Loading while computing is the cache tiers' part: here
all stored KV is on the device, and the link only sets the ratio.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from kvjax.cache.chunks import Variant
from kvjax.reuse.link import QUALITY_FLOOR, balanced_ratio, check_link
from kvjax.reuse.plan import Spans, indices_to_spans
from kvjax.reuse.strategy import CanonicalChunks, Hit, ModelFacts, Prompt, ReadKV, ratio_of


def low_passed(x: np.ndarray, band: float) -> np.ndarray:
    """`x [layers, tokens, ...]` with the lowest `band` of frequencies over tokens, one at least.

    The transform is periodic: the end of a chunk leaks into its start.
    """
    spectrum = np.fft.rfft(x, axis=1)
    kept = max(1, int(np.ceil(band * spectrum.shape[1])))
    spectrum[:, kept:] = 0
    return np.fft.irfft(spectrum, n=x.shape[1], axis=1)


def frequency_scores(k: np.ndarray, v: np.ndarray | None, band: float) -> np.ndarray:
    """Score of each token, f32[tokens], from keys and values `[layers, tokens, kv_heads, width]`.

    Latent KV has no values; its keys count for both.
    """

    def norms(x: np.ndarray) -> np.ndarray:
        left = low_passed(x, band)
        return np.sqrt(np.square(left).sum(axis=(2, 3)))

    of_keys = norms(k)
    scores = of_keys if v is None else (of_keys + norms(v)) / 2
    return scores.mean(axis=0).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class CacheTune(CanonicalChunks):
    """The `ratio` of each chunk's tokens that keep most at low frequencies.

    Args:
      ratio: of each chunk; the least of it where a link sets the ratio.
      band: share of frequencies kept; the paper's 0.5.
      link: bytes a second that stored KV would come at, and
      prefill: tokens a second that the model computes. With both the ratio is the one at which
        loading and computing end together.
    """

    name: ClassVar[str] = "cachetune"
    ratio: float = QUALITY_FLOOR
    band: float = 0.5
    link: float | None = None
    prefill: float | None = None

    def __post_init__(self) -> None:
        ratio_of("ratio", self.ratio)
        if not ratio_of("band", self.band):
            raise ValueError("band must be more than 0, got 0")
        check_link(self.link, self.prefill)

    @property
    def _scores(self) -> str:
        return f"lowpass:{self.band}"

    def annotate(self, variant: Variant, read: ReadKV) -> None:
        """Scores a variant's tokens, once."""
        if self._scores not in variant.scores:
            variant.scores[self._scores] = frequency_scores(*read(), self.band)

    def ratio_for(self, model: ModelFacts) -> float:
        """Share of a chunk's tokens that are run again."""
        if self.link is None or self.prefill is None:
            return self.ratio
        return balanced_ratio(1 / self.prefill, model.kv_token_bytes / self.link, self.ratio)

    def select(self, prompt: Prompt, hits: Sequence[Hit]) -> Spans:
        """The best of each chunk, as far as they are reused here.

        A chunk that nothing has scored is run again: it came into the store by another way.
        """
        ratio, rows = self.ratio_for(prompt.model), []
        for hit in hits:
            scores = hit.variant.scores.get(self._scores)
            count = hit.variant.num_tokens
            best = np.arange(count)
            if scores is not None:
                best = np.argsort(-scores, kind="stable")[: int(ratio * count)]
            at = hit.segment.start + np.sort(best)
            rows.append(at[(at >= hit.start) & (at < hit.stop)])
        return Spans(indices_to_spans(np.concatenate(rows)))
