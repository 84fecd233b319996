"""Where the tests of Mosaic GPU kernels run: on a GPU, in the interpreter, or nowhere."""

import jax
import pytest

from kvjax.pallas_kernels import hopper


def refusal(probe) -> str | None:
    """Why a kernel cannot run on the default device, if so."""
    try:
        probe()
    except NotImplementedError as why:
        return str(why)
    return None


_products, _copies = refusal(hopper.probe), refusal(hopper.probe_copies)
ON_HOPPER = (
    pytest.mark.gpu,
    pytest.mark.skipif(_products is not None, reason=str(_products)),
)
ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(_copies is not None, reason=str(_copies)))
INTERPRETED = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the interpreter runs on a CPU"
)
IN_PLACE = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax 0.10 has no in-place Mosaic GPU kernels"
)
LOWERED = pytest.mark.skipif(
    jax.__version_info__ >= (0, 11),
    reason="from jax 0.11 on lowering needs a CUDA plugin: tests/aot/cuda.py compiles instead",
)
