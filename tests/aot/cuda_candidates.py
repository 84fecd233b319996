"""Every size that `kvjax bench kernels --tune` would try on a GPU, for every head shape."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from kvjax.benchmarks import kernel_tuning
from kvjax.pallas_kernels import tuning


def candidates(
    programs: dict[str, Callable[..., dict[str, Any]]], models: tuple[str, ...]
) -> Iterator[tuple[str, Callable[[Any], dict[str, Any]]]]:
    """Name and check of each; `programs` compile a kernel for a target and a model.

    Those that differ in more than their split come first: a split changes no kernel's body.
    """
    later = []
    for tunable in (t for t in kernel_tuning.TUNABLES if t.backend == "gpu"):
        splits = tunable.candidates.get("split", (None,))
        for model in models:
            for sizes in kernel_tuning.candidates(tunable):
                told = ", ".join(f"{name} {size}" for name, size in sizes.items())
                run = functools.partial(
                    _try, programs[tunable.kernel], tunable.kernel, model, sizes
                )
                case = (f"{tunable.kernel.partition('/')[2]} {model}, {told}", run)
                if sizes.get("split") == splits[-1]:
                    yield case
                else:
                    later.append(case)
    yield from later


def _try(
    program: Callable[..., dict[str, Any]], kernel: str, model: str, sizes: dict[str, int],
    target: Any,
) -> dict[str, Any]:  # fmt: skip
    """What the compiled program keeps to, or why the kernel refuses these sizes."""
    tuning.try_sizes(kernel, sizes)
    try:
        return program(target, model)
    except NotImplementedError as why:
        return {"refused": str(why)}
    finally:
        tuning.try_sizes(kernel, None)
