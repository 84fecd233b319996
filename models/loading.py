"""From named tensors to placed device arrays: shapes checked, dtypes converted, axes sharded."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from kvjax.errors import CorruptWeights
from kvjax.models.config import ModelConfig
from kvjax.models.sharding import Sharding
from kvjax.pallas_kernels import Panels, pack, packs

WeightDtype = Literal["float32", "bfloat16", "int8"]
WEIGHT_DTYPES: tuple[WeightDtype, ...] = ("float32", "bfloat16", "int8")


@dataclasses.dataclass(frozen=True)
class Loader:
    """Reads tensors by Hugging Face name and places them. Used once, while a model is built."""

    config: ModelConfig
    tensors: Mapping[str, np.ndarray]
    dtype: WeightDtype
    sharding: Sharding
    deterministic: bool
    num_positions: int  # length of the rotary tables

    def __post_init__(self) -> None:
        if self.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"dtype must be one of {WEIGHT_DTYPES}, got {self.dtype!r}")

    def get(self, name: str, *shape: int) -> np.ndarray:
        """The tensor `name` as stored.

        Raises:
          CorruptWeights: it is missing or has another shape than the configuration implies.
        """
        try:
            tensor = self.tensors[name]
        except KeyError:
            raise CorruptWeights(f"the checkpoint has no tensor {name!r}") from None
        if tensor.shape != shape:
            raise CorruptWeights(
                f"tensor {name!r} has shape {list(tensor.shape)}, the configuration implies "
                f"{list(shape)}"
            )
        return tensor

    @property
    def activation_dtype(self) -> str:
        """KV and embedding dtype that goes with the weights."""
        return "float32" if self.dtype == "float32" else "bfloat16"

    def weight(
        self, w: np.ndarray, axes: tuple[str | None, ...]
    ) -> tuple[jax.Array | Panels, jax.Array | None]:
        """A matrix `[*out, in]` in the weight dtype, and its scale per output channel if int8.

        It is packed where this machine has the kernel for that and no mesh splits it.
        """
        if self.dtype != "int8":
            return self._matrix(_cast(w, self.dtype), axes), None
        w = w.astype(np.float32)
        scale = np.maximum(np.abs(w).max(axis=-1), 1e-8) / 127
        quantised = np.rint(w / scale[..., None]).astype(np.int8)
        return self._matrix(quantised, axes), self.place(scale, axes[:-1])

    def _matrix(self, w: np.ndarray, axes: tuple[str | None, ...]) -> jax.Array | Panels:
        if self.sharding.mesh is None and packs():
            return Panels(jnp.asarray(pack(w)), w.shape)
        return self.place(w, axes)

    def vector(self, w: np.ndarray, axes: tuple[str | None, ...] = (None,)) -> jax.Array:
        """A bias, norm weight or table, always float32."""
        return self.place(np.asarray(w, np.float32), axes)

    def place(self, x: np.ndarray, axes: tuple[str | None, ...]) -> jax.Array:
        """Puts `x` where its logical axes belong."""
        return jax.device_put(jnp.asarray(x), self.sharding.named(axes, x.shape))


def _cast(w: np.ndarray, dtype: str) -> np.ndarray:
    target = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return w if w.dtype == target else w.astype(target)
