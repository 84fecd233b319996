"""Checks of values: ids in range, intervals inside their sequences, starts that do not fall.

Values that are at hand (numpy, or arrays outside of jit) are always checked. Values that are being
traced are checked when the operation is called with `checks=True` inside a function that `checked`
wraps: a debug mode, since it computes and it fetches.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify


def checked(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` (jitted or not) that raises what its operations with `checks=True` find.

    Raises, when called:
      ValueError: names the argument, the value and the limit.
    """
    run = checkify.checkify(fn, errors=checkify.user_checks)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        error, result = run(*args, **kwargs)
        if message := error.get():
            raise ValueError(message)
        return result

    return call


class Checks:
    """The checks of one call over the arrays it depends on; nothing happens for an idle one."""

    def __init__(self, arrays: Sequence[Any], *, traced: bool) -> None:
        """`traced`: whether to check values that are being traced."""
        self.concrete = all(_at_hand(x) for x in arrays)
        self.active = traced or self.concrete
        self.passed: Any = True
        self.xp: Any = np if self.concrete else jnp  # what conditions are computed with

    def arrays(self, *arrays: Any) -> list[Any]:
        """Each as an array of `xp`."""
        return [self.xp.asarray(x) for x in arrays]

    def spared(self, x: Any, harmless: int) -> Any:
        """`x`, or `harmless` where a traced check has failed: no kernel runs on bad values."""
        if self.concrete or not self.active:
            return x
        return jnp.where(self.passed, x, harmless)

    def forbid(self, name: str, x: Any, wrong: Any, rule: str, limit: Any = None) -> None:
        """Raises ValueError about the first element of `x` where `wrong` holds.

        `limit`, broadcast like `x`, takes the place of "{limit}" in the rule.
        """
        if x.size == 0:
            return
        limit = 0 if limit is None else limit
        wrong, limit = (self.xp.ravel(self.xp.broadcast_to(y, x.shape)) for y in (wrong, limit))
        x = self.xp.ravel(x)
        at = self.xp.argmax(wrong)
        fine = self.xp.logical_not(self.xp.any(wrong))
        self.passed = self.passed & fine
        message = f"{name} must {rule}, got {{value}} at place {{place}}"
        if not self.concrete:
            checkify.check(fine, message, value=x[at], place=at, limit=limit[at])
        elif not fine:
            raise ValueError(message.format(value=x[at], place=at, limit=limit[at]))

    def within(self, name: str, x: Any, first: int, last: int, where: Any = True) -> None:
        """Every element of `x` (where it counts) is in `first..last`."""
        self.forbid(name, x, where & ((x < first) | (x > last)), f"be in {first}..{last}")

    def distinct(self, name: str, ids: Any) -> None:
        """No id that is not negative occurs twice."""
        ids = self.xp.sort(ids)
        if ids.size > 1:
            repeated = (ids[1:] == ids[:-1]) & (ids[1:] >= 0)
            self.forbid(name, ids[1:], repeated, "not repeat an id")

    def ascending(self, name: str, x: Any) -> None:
        """The last axis does not fall."""
        self.forbid(
            name, x[..., 1:], x[..., 1:] < x[..., :-1], "not fall, but {limit} came before it",
            x[..., :-1],
        )  # fmt: skip


def _at_hand(x: Any) -> bool:
    return not isinstance(x, Tracer) and getattr(x, "is_fully_addressable", True)
