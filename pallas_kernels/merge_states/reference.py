"""Merging attention states in float64 numpy: the specification of every backend."""

import numpy as np


def merge_states(o, lse) -> tuple[np.ndarray, np.ndarray]:
    """See `kvjax.pallas_kernels.merge_states`."""
    o, lse = np.asarray(o).astype(np.float64), np.asarray(lse).astype(np.float64)
    out, total = np.zeros(o.shape[1:]), np.full(lse.shape[1:], -np.inf)
    for t, h in np.ndindex(*total.shape):
        parts = np.flatnonzero(lse[:, t, h] > -np.inf)
        if len(parts):
            top = lse[parts, t, h].max()
            total[t, h] = top + np.log(np.exp(lse[parts, t, h] - top).sum())
            out[t, h] = np.exp(lse[parts, t, h] - total[t, h]) @ o[parts, t, h]
    return out, total
