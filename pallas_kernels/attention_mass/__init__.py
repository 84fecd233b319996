"""Sums of attention probabilities, from a saved lse: what selectors of tokens look at.

With `p[i, j] = exp(score[i, j] - lse[i])`, a column sum says how much key `j` was attended to
(query-guided selection, influence), a row's sum over a segment how much query `i` drew from a
chunk (inter- and intra-attention of chunks). Probabilities of a flash kernel are not stored, so
this is a second pass over the keys, without values.
"""

import jax
from jaxtyping import Array, Float, Int, UInt32

from kvjax.pallas_kernels import compat
from kvjax.pallas_kernels.attention_mass import reference, xla
from kvjax.pallas_kernels.attention_mass.result import AttentionMass
from kvjax.pallas_kernels.checks import Checks
from kvjax.pallas_kernels.dispatch import Operation, later
from kvjax.pallas_kernels.page_ops import Pages
from kvjax.pallas_kernels.paged_attention import check_arguments

__all__ = ["AttentionMass", "attention_mass"]

_mass = Operation(
    "attention_mass",
    {"tpu": ("tpu", "xla"), "gpu": ("gpu", "xla"), "*": ("xla",)},
    {
        "gpu": later("kvjax.pallas_kernels.attention_mass.gpu", "attention_mass"),
        "tpu": later("kvjax.pallas_kernels.attention_mass.tpu", "attention_mass"),
        "xla": xla.attention_mass,
        "reference": reference.attention_mass,
    },
    {"reference": "float64 numpy on the host, the specification: only by name, outside jit"},
    {"tpu": compat.probe_tpu, "gpu": later("kvjax.pallas_kernels.hopper", "probe")},
)


def attention_mass(
    q: Float[Array, "tokens q_heads k_width"],
    lse: Float[Array, "tokens q_heads"],
    pages: Pages,
    block_tables: Int[Array, "seqs pages_per_seq"],
    query_starts: Int[Array, " seqs_plus_1"],
    kv_lens: Int[Array, " seqs"],
    visible_lo: Int[Array, " tokens"],
    visible_hi: Int[Array, " tokens"],
    *,
    scale: float,
    segment_starts: Int[Array, "seqs segments_plus_1"] | None = None,
    tail_mask: UInt32[Array, "tokens words"] | None = None,
    soft_cap: float | None = None,
    value_width: int | None = None,
    checks: bool = False,
    backend: str | None = None,
) -> AttentionMass:
    """Column sums `f32[seqs, pages_per_seq * page_size]` and, per row, sums over segments.

    Arguments are those of the `paged_attention` call that gave `lse`. Rows that are not to count
    get an empty interval; with an interval inside the one of `lse`, columns outside of it are 0.
    A key that no row of its sequence sees has a column of 0; a row with an lse of -inf and a token
    of padding add nothing. Slots that no row may see are never read into a result.

    Args:
      segment_starts: ascending indices; segment `g` of sequence `s` is
        `[segment_starts[s, g], segment_starts[s, g + 1])`. None: no segment sums. They are
        `f32[tokens, segments]`, zero for tokens of padding.
      value_width: given where it was given to `paged_attention` (latent pages).

    Raises:
      ValueError: as `paged_attention`, and segments that fall or leave the sequence.
      ExceptionGroup: no backend accepts the inputs; it holds every reason.
    """
    query_starts, kv_lens, visible_hi = check_arguments(
        q, pages, block_tables, query_starts, kv_lens, visible_lo, visible_hi,
        tail_mask=tail_mask, value_width=value_width, checks=checks,
    )  # fmt: skip
    if lse.shape != q.shape[:2]:
        raise ValueError(f"expected an lse per token and head {q.shape[:2]}, got {lse.shape=}")
    if segment_starts is not None:
        shape = segment_starts.shape
        if len(shape) != 2 or shape[0] != block_tables.shape[0] or shape[1] < 2:
            raise ValueError(
                f"segment_starts must be [{block_tables.shape[0]}, segments + 1], got {shape}"
            )
        check = Checks((segment_starts,), traced=checks)
        if check.active:
            (edges,) = check.arrays(segment_starts)
            check.within("segment_starts", edges, 0, block_tables.shape[1] * pages.page_size)
            check.ascending("segment_starts", edges)
    with jax.named_scope("attention_mass"):
        return _mass(
            q, lse, pages, block_tables, query_starts, kv_lens, visible_lo, visible_hi,
            scale=scale, segment_starts=segment_starts, tail_mask=tail_mask, soft_cap=soft_cap,
            value_width=value_width, backend=backend,
        )  # fmt: skip
