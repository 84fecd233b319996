"""Which layers RelayCaching runs quoted text in (arXiv 2603.13289): measured once per model.

What decoding wrote is compared with a full prefill of the same tokens behind another text: by
values, 1 - cosine per token and layer. The range is where that is large; within it, values are
compared in the first layer whose deviations foretell those of the layers above.

The paper's text was not available. Inferred: what counts as large, and that foretelling is meant as
a correlation over tokens.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from kvjax.cache.chunks import tokens_hash
from kvjax.intake import Prompt
from kvjax.llm import LLM
from kvjax.request import Chunk, SamplingParams

Deviations = np.ndarray  # f32[layers, tokens]


@dataclasses.dataclass(frozen=True, slots=True)
class RelayProfile:
    """A layer range, and the mean deviation of each layer that it was found by."""

    start: int
    detect: int
    end: int
    deviation: tuple[float, ...]

    @property
    def spec(self) -> str:
        """The strategy with this range; its `start` wants `LLM.relay(entering=start)`."""
        return f"relaycaching:start={self.start},detect={self.detect},end={self.end}"


def profile(
    llm: LLM,
    cases: Sequence[tuple[Prompt, str]],
    sampling_params: SamplingParams | None = None,
) -> RelayProfile:
    """The range for a model: each case is a prompt that it writes behind, and the text behind which
    what it wrote is quoted.

    Raises:
      ValueError: there are no cases, or nothing deviates in any of them.
    """
    return layer_range([deviations(llm, *case, sampling_params) for case in cases])


def deviations(
    llm: LLM, prompt: Prompt, before: str, sampling_params: SamplingParams | None = None
) -> Deviations:
    """How far values that decoding wrote behind `prompt` are from those of a full prefill behind
    `before`: f32[layers, tokens]. Latents without values are compared as they are."""
    params = sampling_params or SamplingParams()
    (out,) = llm.relay([prompt], params)
    if out.error is not None:
        raise out.error
    tokens, salt = out.outputs[0].token_ids, params.cache_salt
    found = llm.engine.chunks.store.variants(salt, tokens_hash(tokens)).values()
    variant = [v for v in found if v.facts.get("born") == "decode"][-1]
    keys, values = llm.engine.chunks.read(variant)
    quoting = SamplingParams(reuse="prefix", cache_salt=salt)
    with llm.open([before, Chunk(tokens)], quoting) as branch:
        start = len(branch.token_ids) - len(tokens)
        layers = branch.kv()
    if values is None:
        latent = llm.model_config.latent
        rank = keys.shape[-1] if latent is None else latent.kv_lora_rank
        values, full = keys[..., :rank], [layer.k[..., :rank] for layer in layers]
    else:
        full = [layer.v for layer in layers if layer.v is not None]
    return angles(values, np.stack(full)[:, start : start + variant.num_tokens])


def angles(one: np.ndarray, other: np.ndarray) -> Deviations:
    """1 - cosine over heads and channels of `[layers, tokens, heads, width]`."""
    a, b = (x.reshape(*x.shape[:2], -1).astype(np.float64) for x in (one, other))
    norms = np.linalg.norm(a, axis=2) * np.linalg.norm(b, axis=2)
    return np.maximum(0, 1 - (a * b).sum(axis=2) / np.maximum(norms, 1e-30))


def layer_range(
    found: Sequence[Deviations], *, share: float = 0.5, foretells: float = 0.8
) -> RelayProfile:
    """The range of deviations `[layers, tokens]` of some texts: from the first to the last layer
    that deviates at least `share` as much as the one that does most. Values are compared in its
    first layer whose deviations correlate with the mean of those above by `foretells` or more; in
    the one that does best, if none does.

    Raises:
      ValueError: there are no texts, or nothing deviates.
    """
    if not found:
        raise ValueError("a profile needs at least one text")
    mean = np.concatenate(found, axis=1).mean(axis=1)
    if not mean.max() > 0:
        raise ValueError("nothing deviates: the texts were quoted behind what they were written of")
    (large,) = np.nonzero(mean >= share * mean.max())
    start, end = int(large[0]), int(large[-1]) + 1
    candidates = range(start, end - 1)
    foretold = [
        float(np.mean([_correlation(d[layer], d[layer + 1 : end].mean(axis=0)) for d in found]))
        for layer in candidates
    ]
    compared = start
    if foretold:
        good = [i for i, value in zip(candidates, foretold, strict=True) if value >= foretells]
        compared = good[0] if good else start + int(np.argmax(foretold))
    return RelayProfile(start, compared + 1, end, tuple(mean.tolist()))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm else 0.0
