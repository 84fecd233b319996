"""Operations on paged KV: arrays in, arrays out. Imports jax and numpy, never the rest of kvjax.

Names used by every operation: `pages` is one layer's KV, `LayerPages` or `PackedPages`; a *slot* is
`page * page_size + offset`; `block_tables[S, P]` holds the page ids of S sequences in sequence
order; a query token attends to the *indices* in `[visible_lo, visible_hi)` of its own sequence.
"""

from kvjax.pallas_kernels.attention_mass import AttentionMass, attention_mass
from kvjax.pallas_kernels.cascade_attention import (
    CascadePlan,
    cascade_attention,
    cascade_refusal,
    plan_cascade,
)
from kvjax.pallas_kernels.checks import checked
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
from kvjax.pallas_kernels.merge_states import merge_states
from kvjax.pallas_kernels.page_ops import (
    KVSpan,
    LayerPages,
    PackedPages,
    Pages,
    copy_pages,
    empty_pool,
    export_span,
    gather_slots,
    import_span,
    pack_pages,
    split_pages,
    write_slots,
)
from kvjax.pallas_kernels.paged_attention import paged_attention
from kvjax.pallas_kernels.reductions import row_mean_square, row_sum, steady_exp
from kvjax.pallas_kernels.reposition import LowRank, reposition, rotary_shift, rotary_tables

__all__ = [
    "OPERATIONS",
    "Activation",
    "AttentionMass",
    "CascadePlan",
    "KVSpan",
    "LayerPages",
    "LowRank",
    "Operation",
    "PackedPages",
    "Pages",
    "Panels",
    "attention_mass",
    "cascade_attention",
    "cascade_refusal",
    "checked",
    "copy_pages",
    "empty_pool",
    "export_span",
    "gate",
    "gated_linear",
    "gather_slots",
    "import_span",
    "linear",
    "merge_states",
    "pack",
    "pack_pages",
    "packs",
    "paged_attention",
    "plan_cascade",
    "quantise_rows",
    "reposition",
    "rotary_shift",
    "rotary_tables",
    "row_mean_square",
    "row_sum",
    "split_pages",
    "steady_exp",
    "write_slots",
]
