"""Rows that see nothing are a step's padding: zero in every layer, so that products skip them."""

import jax.numpy as jnp
import numpy as np

from kvjax.cache.pages import KVPages
from kvjax.models import kv_spec
from kvjax.readout import row_views
from tests.tiny_model import CONFIG, tiny_model


def test_padding_leaves_every_layer_as_zeros_and_changes_no_other_row() -> None:
    model, spec = tiny_model(), kv_spec(CONFIG, "float32", 16)
    tokens = jnp.array([5, 6, 7, 8, 9, 9, 9, 9], jnp.int32)
    table = jnp.array([[1, 2]], jnp.int32)

    def run(rows: int) -> np.ndarray:
        count = jnp.int32(5)
        index, starts, views = row_views(spec, rows, jnp.int32(0), count, table, write=True)
        pages = KVPages.allocate(spec, 3)
        hidden, _, _ = model.layers(model.embed(tokens[:rows]), pages, index, starts, views)
        return np.asarray(hidden)

    padded, exact = run(8), run(5)
    assert not padded[5:].any()
    np.testing.assert_array_equal(padded[:5], exact)
    assert np.abs(exact).min(axis=1).all()
