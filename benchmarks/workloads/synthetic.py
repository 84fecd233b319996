"""Workloads of pseudo-random token ids, with the sharing that each one's name says."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from kvjax.benchmarks.workloads import Options, Part, Request

DEFAULT_PROMPTS = 64
BREAKER_LEN = 32
_LONGEST = 16  # of stragglers: times the usual output


def tokens(rng: np.random.Generator, count: int, vocab_size: int) -> tuple[int, ...]:
    """Ids of the upper 31/32 of the vocabulary: special tokens are at its start, mostly."""
    return tuple(int(t) for t in rng.integers(vocab_size // 32, vocab_size, size=count))


def lengths(rng: np.random.Generator, mean: int, ratio: float, count: int) -> list[int]:
    """Uniform integers in [mean (1 - ratio), mean (1 + ratio)], at least 1."""
    low, high = max(1, round(mean * (1 - ratio))), max(1, round(mean * (1 + ratio)))
    return [int(n) for n in rng.integers(low, high + 1, size=count)]


def random(o: Options) -> Sequence[Request]:
    """Independent prompts of about `input_len`: they share next to nothing."""
    return [_request(rng, head, o) for rng, head in _each(o)]


def zero_sharing(o: Options) -> Sequence[Request]:
    """The same, but no two prompts begin with the same token: a cache can only cost here."""
    return [_request(rng, head, o) for rng, head in _each(o, distinct=True)]


def shared_prefix(o: Options) -> Sequence[Request]:
    """`num_prefixes` groups of prompts: `prefix_len` in common, `input_len` of one's own."""
    rng = np.random.default_rng([o.seed, 1])
    prefixes = [tokens(rng, o.prefix_len, o.vocab_size) for _ in range(o.num_prefixes)]
    order = rng.permutation(_count(o)) % o.num_prefixes
    return [
        Request((Part(token_ids=prefixes[group]), *_request(own, head, o).parts), length)
        for group, (own, head), length in zip(order, _each(o), _outputs(o), strict=True)
    ]


def long_document(o: Options) -> Sequence[Request]:
    """The same `num_contexts` documents of `context_len` in another order in each prompt.

    A question of `input_len` follows. The order of the first prompt never comes again, while there
    are others left.
    """
    rng = np.random.default_rng([o.seed, 1])
    documents = [
        Part(token_ids=tokens(rng, o.context_len, o.vocab_size), passage=True)
        for _ in range(o.num_contexts)
    ]
    orders = _orders(rng, o.num_contexts, _count(o))
    return [
        Request((*(documents[d] for d in order), *_request(own, head, o).parts), length)
        for order, (own, head), length in zip(orders, _each(o), _outputs(o), strict=True)
    ]


def prefix_suffix(o: Options) -> Sequence[Request]:
    """A shared prefix, a breaker of 32 tokens of one's own, a shared suffix: `input_len` in all.

    Prefix caching can reuse the prefix alone; the suffix is the same text at the same positions.
    """
    prefix_len = round(o.input_len * o.prefix_ratio)
    suffix_len = o.input_len - prefix_len - BREAKER_LEN
    if min(prefix_len, suffix_len) < 1:
        raise ValueError(
            f"input_len must leave room for a breaker of {BREAKER_LEN} between a prefix and a "
            f"suffix, got {o.input_len} with prefix_ratio {o.prefix_ratio}"
        )
    rng = np.random.default_rng([o.seed, 1])
    prefix = Part(token_ids=tokens(rng, prefix_len, o.vocab_size))
    suffix = Part(token_ids=tokens(rng, suffix_len, o.vocab_size), passage=True)
    found = []
    for (own, head), length in zip(_each(o, distinct=True), _outputs(o), strict=True):
        breaker = Part(token_ids=(head, *tokens(own, BREAKER_LEN - 1, o.vocab_size)))
        found.append(Request((prefix, breaker, suffix), length))
    return found


def stragglers(o: Options) -> Sequence[Request]:
    """Output lengths with a heavy tail, as of reasoning: log-normal, of median `output_len`.

    Sigma is 1, no answer is longer than 16 times the median.
    """
    draws = np.random.default_rng([o.seed, 3]).lognormal(math.log(o.output_len), 1.0, _count(o))
    outputs = [int(n) for n in np.clip(np.rint(draws), 1, _LONGEST * o.output_len)]
    requests = zip(random(o), outputs, strict=True)
    return [Request(request.parts, length) for request, length in requests]


def _count(o: Options) -> int:
    return o.num_prompts or DEFAULT_PROMPTS


def _outputs(o: Options) -> list[int]:
    return lengths(np.random.default_rng([o.seed, 2]), o.output_len, o.range_ratio, _count(o))


def _each(o: Options, distinct: bool = False) -> list[tuple[np.random.Generator, int]]:
    """A generator and a first token for each prompt; the tokens all differ where that is asked."""
    low, count = o.vocab_size // 32, _count(o)
    rng = np.random.default_rng([o.seed, 4])
    if distinct and count > o.vocab_size - low:
        raise ValueError(
            f"{count} prompts cannot all begin with another one of {o.vocab_size - low} tokens"
        )
    heads = rng.choice(np.arange(low, o.vocab_size), size=count, replace=not distinct)
    return [(np.random.default_rng([o.seed, 5, i]), int(head)) for i, head in enumerate(heads)]


def _request(rng: np.random.Generator, head: int, o: Options) -> Request:
    (length,) = lengths(rng, o.input_len, o.range_ratio, 1)
    (output,) = lengths(rng, o.output_len, o.range_ratio, 1)
    return Request((Part(token_ids=(head, *tokens(rng, length - 1, o.vocab_size))),), output)


def _orders(rng: np.random.Generator, items: int, count: int) -> list[tuple[int, ...]]:
    """Different permutations, as long as there are any; then they come again."""
    if math.factorial(items) <= count:
        every = list(itertools.permutations(range(items)))
        shuffled = [every[i] for i in rng.permutation(len(every))]
        return [shuffled[i % len(shuffled)] for i in range(count)]
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        found[tuple(int(i) for i in rng.permutation(items))] = None
    return list(found)
