"""KV on the device: `KVSpec` says what a model keeps, `KVPages` holds it, `KVView` addresses it."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.pallas_kernels import LayerPages, PackedPages, Pages, copy_pages, empty_pool
from kvjax.pallas_kernels.page_ops import packed_scale_shape, packed_width

PageLayout = Literal["split", "packed"]
KVKind = Literal["full", "sliding", "latent"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVGroup:
    """Layers that keep the same kind of KV and are addressed by one view."""

    kind: KVKind
    layers: tuple[int, ...]
    num_kv_heads: int
    k_width: int
    v_width: int  # 0: values are leading channels of the keys (latent)
    dtype: str
    window: int | None = None  # tokens a query sees, its own included; None is all

    def page_shapes(
        self, num_pages: int, page_size: int, layout: PageLayout = "split", shards: int = 1
    ) -> Pages:
        """Shapes and storage dtypes of one layer's pages, as `jax.ShapeDtypeStruct`.

        `shards`: devices that the heads are split over; each one's part is packed by itself.
        """
        if layout == "packed":
            return self._packed_shapes(num_pages, page_size, shards)

        def pool(width: int) -> Any:
            shape = (num_pages, self.num_kv_heads, page_size, width)
            return jax.ShapeDtypeStruct(shape, storage_dtype(self.dtype)) if width else None

        def scale(width: int) -> Any:
            shape = (num_pages, self.num_kv_heads, page_size)
            scaled = width and self.scale_bytes
            return jax.ShapeDtypeStruct(shape, jnp.float32) if scaled else None

        return LayerPages(
            pool(self.k_width), pool(self.v_width), scale(self.k_width), scale(self.v_width)
        )

    def _packed_shapes(self, num_pages: int, page_size: int, shards: int) -> PackedPages:
        lanes = packed_width(self.k_width, self.v_width or None)
        shape, scale = (num_pages, self.num_kv_heads, page_size, lanes), None
        if self.scale_bytes:
            latent = not self.v_width
            shards = 1 if latent else shards
            rows, slots = packed_scale_shape(self.num_kv_heads // shards, page_size, latent=latent)
            scale = jax.ShapeDtypeStruct((num_pages, shards * rows, slots), jnp.float32)
        pages: Any = (jax.ShapeDtypeStruct(shape, storage_dtype(self.dtype)), scale)
        return PackedPages(*pages)

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scale that each key and each value of a head has; 0 without scales."""
        return 4 if self.dtype in SCALED else 0


STORAGE = {"float32": "float32", "bfloat16": "uint16", "int8": "int8", "float8_e4m3fn": "uint8"}
SCALED = ("int8", "float8_e4m3fn")  # with a float32 scale per slot and head


def layout_for(platform: str) -> PageLayout:
    """How pages lie on `platform`: packed where a row must fill the registers of a TPU."""
    return "packed" if platform == "tpu" else "split"


def storage_dtype(dtype: str) -> jnp.dtype:
    """What pages of `dtype` are held as: floats that XLA:CPU would convert, as their bits."""
    if dtype not in STORAGE:
        raise ValueError(f"KV dtype must be one of {list(STORAGE)}, got {dtype!r}")
    return jnp.dtype(STORAGE[dtype])


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVSpec:
    """What a model dictates about its cache. Hashable, so jit can take it as static."""

    groups: tuple[KVGroup, ...]
    page_size: int
    layout: PageLayout = "split"
    shards: int = 1  # devices that the KV heads are split over

    def __post_init__(self) -> None:
        if self.page_size < 16 or self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size must be a power of two from 16 on, got {self.page_size}")
        layers = sorted(layer for group in self.groups for layer in group.layers)
        if layers != list(range(len(layers))):
            raise ValueError(f"groups must cover every layer once, got layers {layers}")

    @property
    def num_layers(self) -> int:
        """Layers over all groups."""
        return sum(len(group.layers) for group in self.groups)

    @property
    def group_of(self) -> tuple[int, ...]:
        """Layer number to group number."""
        table = {layer: g for g, group in enumerate(self.groups) for layer in group.layers}
        return tuple(table[layer] for layer in range(self.num_layers))

    def page_shapes(self, group: KVGroup, num_pages: int) -> Pages:
        """Shapes and storage dtypes of one layer of `group`."""
        return group.page_shapes(num_pages, self.page_size, self.layout, self.shards)

    def layer_bytes(self, group: KVGroup) -> int:
        """Bytes that one token takes in one layer of `group`: scales and padding included."""
        leaves = jax.tree.leaves(self.page_shapes(group, 1))
        per_page = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        assert per_page % self.page_size == 0
        return per_page // self.page_size

    def group_bytes(self, num_tokens: int) -> tuple[int, ...]:
        """Bytes that the KV of `num_tokens` tokens takes in each group: all that is allocated."""
        return tuple(num_tokens * len(g.layers) * self.layer_bytes(g) for g in self.groups)

    def bytes(self, num_tokens: int) -> int:
        """Bytes that the KV of `num_tokens` tokens takes."""
        return sum(self.group_bytes(num_tokens))

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return self.bytes(self.page_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVPages:
    """All layers' pages. Donated to, and returned by, every device function; nobody keeps a copy.

    Page `p` of every group belongs to the same tokens, so one block table serves all groups.
    """

    layers: tuple[Pages, ...]

    @staticmethod
    def abstract(spec: KVSpec, num_pages: int) -> "KVPages":
        """The pytree with `jax.ShapeDtypeStruct` leaves: sized before it exists."""
        shapes = [spec.page_shapes(group, num_pages) for group in spec.groups]
        return KVPages(tuple(shapes[group] for group in spec.group_of))

    @staticmethod
    def allocate(
        spec: KVSpec,
        num_pages: int,
        sharding: Callable[[tuple[int, ...], int], jax.sharding.Sharding] | None = None,
    ) -> "KVPages":
        """Pages of no particular content.

        `sharding` maps a pool's shape and its number of KV heads to where it lies.
        """

        def layer(pages: Pages) -> Pages:
            def pool(leaf: jax.ShapeDtypeStruct) -> Array:
                return empty_pool(leaf, sharding(leaf.shape, pages.kv_heads) if sharding else None)

            return jax.tree.map(pool, pages)

        return KVPages(tuple(map(layer, KVPages.abstract(spec, num_pages).layers)))

    @property
    def num_pages(self) -> int:
        """Pages in each pool."""
        return self.layers[0].num_pages

    def copied(self, src: Array, dst: Array) -> "KVPages":
        """Pages `src[i]` copied to `dst[i]` in every layer; a `dst` of -1 is dropped."""
        return KVPages(tuple(copy_pages(layer, src, dst) for layer in self.layers))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVView:
    """Where one KV group keeps a batch: T query tokens of S sequences, P pages each at most."""

    write_slots: Array  # i32[T]; -1: the token's KV is not written
    visible_lo: Array  # i32[T]
    visible_hi: Array  # i32[T]; an index, at most the sequence's kv_len
    block_tables: Array  # i32[S, P]
    kv_lens: Array  # i32[S]; slots written once this step's tokens are
    tail_mask: Array | None = None  # u32[T, W / 32] over the last W keys
    # Sequences [group_starts[g], group_starts[g + 1]) keep their first prefix_lens[g] indices on
    # the same pages, and attention reads those once; None: attention takes each by itself.
    group_starts: Array | None = None  # i32[G + 1]
    prefix_lens: Array | None = None  # i32[G]
