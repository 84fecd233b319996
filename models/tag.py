"""A short name for a model as it is loaded, to tell what was made with it from what was not."""

import hashlib

import jax
import numpy as np
from flax import nnx

from kvjax.models.transformer import Transformer


def model_tag(model: Transformer) -> str:
    """64 bits over the configuration, the shapes and types of all weights, and those weights that
    are vectors: norms, biases, scales. Reads no matrix; models that differ in nothing else share
    it, so files are told apart by `Checkpoint.fingerprint`."""
    _, state = nnx.split(model)
    digest = hashlib.blake2b(repr(model.config).encode(), digest_size=8)
    for leaf in jax.tree.leaves(state):
        digest.update(repr((leaf.shape, str(leaf.dtype))).encode())
        if leaf.ndim == 1:
            digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
