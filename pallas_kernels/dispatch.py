"""Choosing a backend. A backend refuses with `NotImplementedError("why")`; every reason is kept."""

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

OPERATIONS: dict[str, "Operation"] = {}  # by name, filled as operations are defined


@dataclasses.dataclass
class Operation:
    """One operation and its implementations. Called like a function, with `backend=` on top.

    `backend=None` takes the first preferred implementation that does not refuse; a backend asked
    for by name runs or raises. Implementations from outside join through `register`.
    """

    name: str
    preferred: dict[str, tuple[str, ...]]  # platform -> backends in order; "*" is any platform
    implementations: dict[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)  # why never chosen by itself
    probes: dict[str, Callable[[], None]] = dataclasses.field(default_factory=dict)  # or refuse

    _only: str | None = None

    def __post_init__(self) -> None:
        OPERATIONS[self.name] = self

    def register(
        self, backend: str, fn: Callable[..., Any], *, platforms: tuple[str, ...] = ()
    ) -> None:
        """Adds an implementation and puts it first on `platforms`; none means "by name only".

        What jax has traced before keeps the backend it chose: register before the first engine is
        made, or call `jax.clear_caches()`.
        """
        self.implementations[backend] = fn
        for platform in platforms:
            rest = self.preferred.get(platform, self.preferred.get("*", ()))
            self.preferred[platform] = (backend, *(b for b in rest if b != backend))

    def order(self, platform: str) -> tuple[str, ...]:
        """Backends tried on `platform`, best first."""
        return self.preferred.get(platform, self.preferred.get("*", ()))

    @contextlib.contextmanager
    def only(self, backend: str) -> Iterator[None]:
        """Calls that name no backend are as if they named `backend`: no other steps in."""
        before, self._only = self._only, backend
        try:
            yield
        finally:
            self._only = before

    def explain(self, platform: str) -> dict[str, str]:
        """Backend name to "chosen" or the reason why it is not, for `kvjax info`."""
        order = self.order(platform)
        told = {}
        chosen = None
        for backend in (*order, *(b for b in self.implementations if b not in order)):
            if backend not in order:
                told[backend] = self.notes.get(backend, f"only by name on {platform}")
            elif chosen is not None:
                told[backend] = f"after {chosen}"
            elif (why := self._refusal(backend)) is not None:
                told[backend] = why
            else:
                told[backend], chosen = "chosen", backend
        return told

    def _refusal(self, backend: str) -> str | None:
        """Why `backend` takes no input at all on this machine, if so."""
        try:
            self.probes.get(backend, lambda: None)()
        except NotImplementedError as why:
            return str(why)
        return None

    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        backend = backend or self._only
        if backend is not None:
            if backend not in self.implementations:
                known = list(self.implementations)
                raise ValueError(f"{self.name} has no backend {backend!r}; there are {known}")
            return self.implementations[backend](*args, **kwargs)
        refusals: list[Exception] = []
        for name in self.order(jax.default_backend()):
            try:
                return self.implementations[name](*args, **kwargs)
            except NotImplementedError as why:
                refusals.append(why)
        raise ExceptionGroup(f"no backend of {self.name} accepts these inputs", refusals)


def later(module: str, name: str) -> Callable[..., Any]:
    """The function `name` of `module`, which is imported at the first call.

    For backends of other devices: a CPU need not load their compilers to start.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call
