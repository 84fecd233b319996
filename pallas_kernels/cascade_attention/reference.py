"""Cascade attention's specification: plain paged attention, for which the groups do not matter."""

from kvjax.pallas_kernels.paged_attention import reference


def cascade_attention(*args, group_starts, prefix_lens, **options):
    """See `kvjax.pallas_kernels.cascade_attention`; float64 numpy."""
    del group_starts, prefix_lens
    return reference.paged_attention(*args, **options)
