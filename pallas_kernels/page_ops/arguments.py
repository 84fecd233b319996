"""What page operations check of their arguments."""

import jax.numpy as jnp

from kvjax.pallas_kernels.checks import Checks
from kvjax.pallas_kernels.page_ops.pages import LayerPages, Pages

Widths = tuple[int, int | None]  # of keys and values; None: the values are in the keys


def check_rows(pages: Pages, k, v, slots) -> None:
    """Keys and values of tokens fit each other, their slots and the pages."""
    if slots.shape != k.shape[:1]:
        raise ValueError(f"expected one slot per token, got {slots.shape=} {k.shape=}")
    if k.ndim != 3 or k.shape[1] != pages.kv_heads:
        raise ValueError(f"keys must be [tokens, {pages.kv_heads}, width], got {k.shape=}")
    if v is not None and v.shape[:2] != k.shape[:2]:
        raise ValueError(f"keys and values differ in tokens or heads: {k.shape=} {v.shape=}")
    if isinstance(pages, LayerPages):
        if (v is None) != (pages.v is None):
            raise ValueError(
                f"values given: {v is not None}, pages hold values: {pages.v is not None}"
            )
        held = (pages.k.shape[3], None if pages.v is None else pages.v.shape[3])
        if (k.shape[2], None if v is None else v.shape[2]) != held:
            raise ValueError(f"pages hold widths {held}, got {k.shape=} v.shape={_shape(v)}")
        return
    half = pages.kv.shape[3] // (1 if v is None else 2)
    if k.shape[2] > half or (v is not None and v.shape[2] > half):
        raise ValueError(f"{pages.kv.shape[3]} lanes do not hold {k.shape=} v.shape={_shape(v)}")


def _shape(x) -> tuple[int, ...] | None:
    return None if x is None else x.shape


def vector(name: str, x) -> None:
    """Raises ValueError unless `x` has one axis."""
    if len(x.shape) != 1:
        raise ValueError(f"{name} must be a vector, got shape {x.shape}")


def widths_of(pages: Pages, widths: Widths | None) -> Widths:
    """The widths of keys and values; split pages know theirs."""
    if isinstance(pages, LayerPages):
        return pages.k.shape[3], None if pages.v is None else pages.v.shape[3]
    if widths is None:
        raise ValueError(f"packed pages of {pages.kv.shape[3]} lanes need widths=(keys, values)")
    return widths


def check_ids(name: str, ids, last: int, checks: bool, *, distinct: bool = False):
    """Ids are -1 (padding) or in `0..last`. Returns them, or padding if a traced check fails."""
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {ids.dtype}")
    check = Checks((ids,), traced=checks)
    if check.active:
        (x,) = check.arrays(ids)
        check.within(name, x, -1, last)
        if distinct:
            check.distinct(name, x)
    return check.spared(ids, -1)


def check_moves(num: int, src, dst, what: str, checks: bool):
    """Destinations are distinct and in range or -1; sources are in range where there is one.

    Returns both, or only padding if a traced check fails.
    """
    dst = check_ids(f"dst_{what}", dst, num - 1, checks, distinct=True)
    check = Checks((src, dst), traced=checks)
    if check.active:
        x, to = check.arrays(src, dst)
        check.within(f"src_{what}", x, 0, num - 1, to >= 0)
    return check.spared(src, 0), check.spared(dst, -1)
