"""Tensor parallelism: one table from logical axes of arrays to axes of the device mesh."""

import dataclasses
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# What is split over the mesh axis "model". Everything else is replicated.
LOGICAL_AXES: Mapping[str, str] = {"kv_heads": "model", "mlp": "model", "vocab": "model"}


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh and the table. `mesh=None` is one device and no constraint at all.

    An axis that the mesh does not divide is replicated, except `kv_heads`: an engine whose KV does
    not split gains nothing from a mesh, so that is refused.
    """

    mesh: Mesh | None = None
    table: tuple[tuple[str, str], ...] = tuple(LOGICAL_AXES.items())

    def spec(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """Partition of an array with these logical axes.

        Raises:
          ValueError: `kv_heads` is not a multiple of the mesh axis it maps to.
        """
        assert self.mesh is not None
        table, entries = dict(self.table), []
        for axis, size in zip(axes, shape, strict=True):
            mesh_axis = table.get(axis) if axis else None
            ways = self.mesh.shape.get(mesh_axis, 1) if mesh_axis else 1
            if size % ways and axis == "kv_heads":
                raise ValueError(f"{size} KV heads cannot be split {ways} ways")
            entries.append(mesh_axis if ways > 1 and size % ways == 0 else None)
        return PartitionSpec(*entries)

    def named(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding | None:
        """`NamedSharding` for `jax.device_put`, or None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, self.spec(axes, shape))

    @property
    def ways(self) -> int:
        """Devices that the KV heads are split over."""
        return 1 if self.mesh is None else self.mesh.shape.get(dict(self.table)["kv_heads"], 1)

    def pages(self, shape: tuple[int, ...], kv_heads: int) -> NamedSharding:
        """Where a pool `[pages, kv_heads (or rows of scales), ..]` lies; one head is whole."""
        assert self.mesh is not None
        axes = (None, "kv_heads" if kv_heads > 1 else None, *(None,) * (len(shape) - 2))
        return NamedSharding(self.mesh, self.spec(axes, shape))

    def replicate(self, x: jax.Array) -> jax.Array:
        """Constrains `x` to lie whole on every device (inside jit)."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec()))
