"""What the device reaches: `python -m kvjax.benchmarks.ceilings DTYPE` prints bytes/s and FLOP/s.

`copy` reads and writes a large array. `matmul` is the best of XLA's product in float32, that in
bfloat16 where the dtype is not wider, and the one that kvjax's layers use for the dtype: what XLA
makes of int8 on a CPU is no ceiling.
"""

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from kvjax.benchmarks.kernels import Timer

_ROWS, _ROUNDS = 512, 5
_DTYPES = ("float32", "bfloat16", "int8")


def measure(dtype: str) -> dict[str, float]:
    """Bytes per second and FLOPs per second on the default device; takes a few seconds."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    import jax

    from kvjax.benchmarks import kernel_cases as cases

    sizes = cases.CPU if jax.default_backend() == "cpu" else cases.GPU
    return of(sizes, dtype, _ROUNDS)


def of(sizes: Any, dtype: str, rounds: int) -> dict[str, float]:
    """The same with the sizes of `kvjax bench kernels`."""

    def seconds(subject: Any) -> float:
        timer = Timer(subject)
        timer.warm_up()
        return min(timer() for _ in range(rounds))

    copied = 2 * sizes.copy_bytes / seconds(_copy(sizes.copy_bytes))
    products = [one.flops / seconds(one) for one in _products(dtype, sizes.matmul)]
    return {"copy": copied, "matmul": max(products)}


def _copy(size: int) -> Any:
    import jax.numpy as jnp

    from kvjax.benchmarks.kernel_cases import Subject

    return Subject("copy", lambda _, x: -x, None, jnp.ones(size // 4, jnp.float32), 2.0 * size)


def _products(dtype: str, n: int) -> Iterator[Any]:
    import jax.numpy as jnp
    import numpy as np

    from kvjax.benchmarks.kernel_cases import Subject
    from kvjax.pallas_kernels.linear import Panels, linear, pack, packs

    def subject(weights: Any, rows: Any, product: Callable[[Any, Any], Any]) -> Any:
        def step(w: Any, x: Any) -> Any:
            return (product(w, x) * n**-0.5).astype(x.dtype)

        return Subject("matmul", step, weights, rows, 0.0, 2.0 * rows.shape[0] * n * n)

    for kind in ("float32",) if dtype == "float32" else ("float32", "bfloat16"):
        square = jnp.ones((n, n), kind)
        yield subject(square, square + 0, lambda w, x: x @ w)
    stored = np.ones((n, n), jnp.dtype(dtype))
    weights = Panels(jnp.asarray(pack(stored)), (n, n)) if packs() else jnp.asarray(stored)
    scale = jnp.ones(n, jnp.float32) if dtype == "int8" else None
    yield subject(
        (weights, scale), jnp.ones((_ROWS, n), jnp.float32), lambda w, x: linear(x, w[0], w[1])
    )


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
