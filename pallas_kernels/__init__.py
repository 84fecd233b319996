"""Operations on paged KV: arrays in, arrays out. Imports jax and numpy, never the rest of kvjax.

Names used by every operation: `pages` is one layer's `LayerPages`; a *slot* is `page * page_size +
offset`; `block_tables[S, P]` holds the page ids of S sequences in sequence order; a query token
attends to the *indices* in `[visible_lo, visible_hi)` of its own sequence.
"""

from kvjax.pallas_kernels.dispatch import OPERATIONS, Operation
from kvjax.pallas_kernels.linear import (
    Activation,
    Panels,
    gate,
    gated_linear,
    linear,
    pack,
    packs,
    quantise_rows,
)
from kvjax.pallas_kernels.page_ops import (
    LayerPages,
    copy_pages,
    empty_pool,
    gather_slots,
    write_slots,
)
from kvjax.pallas_kernels.paged_attention import paged_attention
from kvjax.pallas_kernels.reductions import row_mean_square, row_sum, steady_exp

__all__ = [
    "OPERATIONS",
    "Activation",
    "LayerPages",
    "Operation",
    "Panels",
    "copy_pages",
    "empty_pool",
    "gate",
    "gated_linear",
    "gather_slots",
    "linear",
    "pack",
    "packs",
    "paged_attention",
    "quantise_rows",
    "row_mean_square",
    "row_sum",
    "steady_exp",
    "write_slots",
]
