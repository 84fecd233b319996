"""Attention over parts of the keys, merged into attention over all of them.

The identity behind split keys, cascades and context parallelism: FlashInfer (arXiv 2501.01005),
section 2.2.
"""

import jax
from jaxtyping import Array, Float

from kvjax.pallas_kernels.dispatch import Operation
from kvjax.pallas_kernels.merge_states import reference, xla

_merge = Operation(
    "merge_states",
    {"*": ("xla",)},
    {"xla": xla.merge_states, "reference": reference.merge_states},
    {"reference": "float64 numpy on the host, the specification: only by name, outside jit"},
)


def merge_states(
    o: Float[Array, "parts tokens heads width"],
    lse: Float[Array, "parts tokens heads"],
    *,
    backend: str | None = None,
) -> tuple[Float[Array, "tokens heads width"], Float[Array, "tokens heads"]]:
    """Output and lse (natural logarithm) over the union of disjoint sets of keys, float32.

    `o[i]` and `lse[i]` are what attention over part `i` alone gives. A part with an lse of -inf
    saw nothing and counts for nothing, whatever its output holds; a row with only such parts gives
    zeros and -inf.

    Raises:
      ValueError: shapes that do not fit each other, or no parts.
    """
    if o.ndim != 4 or lse.shape != o.shape[:3] or not o.shape[0]:
        raise ValueError(
            f"expected o[parts, tokens, heads, width] and an lse for each row, got {o.shape=} "
            f"{lse.shape=}"
        )
    with jax.named_scope("merge_states"):
        return _merge(o, lse, backend=backend)
