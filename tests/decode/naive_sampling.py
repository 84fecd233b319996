"""The sampling pipeline spelled out for one row in float64: what the device must agree with."""

import numpy as np

from kvjax.request import SamplingParams


def edited(
    logits: np.ndarray,
    params: SamplingParams,
    prompt: list[int],
    output: list[int],
    bad_words: list[list[int]],
    end_ids: list[int],
) -> np.ndarray:
    """Logits of one row after bans, biases, penalties and temperature."""
    x = np.asarray(logits, np.float64).copy()
    for word in bad_words:
        start = word[:-1]
        if not start or output[-len(start) :] == start:
            x[word[-1]] = -np.inf
    if len(output) < params.min_tokens:
        for token in [*end_ids, *(params.stop_token_ids or ())]:
            x[token] = -np.inf
    if params.allowed_token_ids is not None:
        for token in set(range(len(x))) - set(params.allowed_token_ids):
            x[token] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in set(prompt) | set(output):
        r = params.repetition_penalty
        x[token] = x[token] / r if x[token] > 0 else x[token] * r
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    if params.temperature >= 1e-5:
        x /= params.temperature
    return x


def kept_by_min_p(x: np.ndarray, min_p: float) -> np.ndarray:
    return softmax(x) >= min_p * softmax(x).max()


def kept_by_top_k(x: np.ndarray, top_k: int) -> np.ndarray:
    return x >= np.sort(x)[::-1][min(top_k, len(x)) - 1]


def kept_by_top_p(x: np.ndarray, top_p: float) -> np.ndarray:
    probabilities = np.sort(softmax(x))[::-1]
    last = int(np.argmax(np.cumsum(probabilities) >= top_p - 1e-12))
    return softmax(x) >= probabilities[last]


def distribution(x: np.ndarray, params: SamplingParams) -> np.ndarray:
    """What a random row is drawn from, given its edited logits."""
    if params.min_p > 0:
        x = np.where(kept_by_min_p(x, params.min_p), x, -np.inf)
    if params.top_k > 0:
        x = np.where(kept_by_top_k(x, params.top_k), x, -np.inf)
    if params.top_p < 1:
        x = np.where(kept_by_top_p(x, params.top_p), x, -np.inf)
    return softmax(x)


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(np.asarray(x, np.float64) - np.max(x))
    return weights / weights.sum()
