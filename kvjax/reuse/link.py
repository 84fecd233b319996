"""How much to compute again while KV is loaded: CacheTune's model of a link (arXiv 2605.24022),
which loads the rest, and CacheBlend's loading controller (2405.16444, section 5), which loads all.

Per token, over all layers: computing takes `compute` seconds, loading `load` seconds. Both go on at
the same time, so a share r of N tokens computed takes `N max(r compute, (1 - r) load)`.
"""

from collections.abc import Callable

QUALITY_FLOOR = 0.15  # below it answers get worse (the paper's setting)
_GOLDEN = (5**0.5 - 1) / 2


def balanced_ratio(compute: float, load: float, floor: float = QUALITY_FLOOR) -> float:
    """The share to compute for which computing and loading end together, `floor` at least.

    Raises:
      ValueError: a time is negative, both are 0, or the floor is no share.
    """
    if compute < 0 or load < 0 or compute + load == 0:
        raise ValueError(f"compute and load are seconds and not both 0, got {compute=}, {load=}")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must be in [0, 1], got {floor}")
    return max(floor, load / (compute + load))


def hidden_ratio(compute: float, load: float, floor: float = QUALITY_FLOOR) -> float:
    """The least share whose computing takes as long as loading everything does, `floor` at least
    and 1 at most: more of it costs no time. Raises as `balanced_ratio` does."""
    balanced_ratio(compute, load, floor)  # which checks them
    return max(floor, min(1.0, load / compute if compute else 1.0))


def check_link(link: float | None, prefill: float | None) -> None:
    """Raises `ValueError` unless both are positive, or both None."""
    for name, value in (("link", link), ("prefill", prefill)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and value > 0):
            raise ValueError(f"{name} must be more than 0, got {value!r}")
    if (link is None) != (prefill is None):
        raise ValueError(f"link and prefill go together, got {link=}, {prefill=}")


def overlapped_seconds(
    ratio: float, num_tokens: int, compute: float, load: float, overhead: float = 0.0
) -> float:
    """Time until `num_tokens` are there if `ratio` of them is computed and the rest is loaded."""
    return num_tokens * max(ratio * compute, (1 - ratio) * load) + overhead


def searched_ratio(
    measure: Callable[[float], float],
    low: float = QUALITY_FLOOR,
    high: float = 1.0,
    *,
    calls: int = 8,
) -> float:
    """The ratio with the least `measure` (a time to first token) by golden-section search.

    Right for a measure with one minimum, to within `(high - low) 0.618 ** (calls - 1)`.

    Raises:
      ValueError: the bounds do not ascend within [0, 1], or fewer than two calls.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"bounds must ascend within [0, 1], got [{low}, {high}]")
    if calls < 2:
        raise ValueError(f"calls must be at least 2, got {calls}")
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = measure(left), measure(right)
    for _ in range(calls - 2):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = measure(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = measure(right)
    return left if at_left <= at_right else right
