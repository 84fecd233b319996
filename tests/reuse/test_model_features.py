"""Reuse over models whose positions are special: scaled, partial, of two bases, windowed, latent.

Nothing here is refused: the table of rotations is fixed when a model is built ("dynamic" and
"longrope" choose once, for the longest sequence), so a stored key is one turn from any position.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import SamplingParams
from kvjax.cache.pages import KVPages, KVView
from kvjax.models import Transformer, kv_spec
from kvjax.pallas_kernels import gather_slots
from kvjax.request import Chunk
from kvjax.reuse.move import move_chunks
from kvjax.reuse.plan import Spans, Stage, StagedPlan, TopK, rest_of
from kvjax.reuse.strategy import CanonicalChunks, Hit, Prompt
from tests.reuse.families import FEATURES, letters, llm_with, model_with

PAGE, TOKENS = 16, 48
SYSTEM, A, B, QUESTION = (letters(n, seed) for seed, n in enumerate((11, 30, 25, 9)))
PROMPT = [SYSTEM, Chunk(A), Chunk(B), QUESTION]
QUICK = ("latent, YaRN", "two bases, one of them scaled")
EVERY = [
    pytest.param(feature, marks=() if feature in QUICK else pytest.mark.slow, id=feature)
    for feature in FEATURES
]


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    """Nothing here depends on how well XLA optimises, and the time goes into compiling."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def encode(model: Transformer, pages: KVPages, first_page: int, position: int) -> KVPages:
    """KV of a text of its own from `first_page` on, its first token at rotary `position`."""
    at = jnp.arange(TOKENS, dtype=jnp.int32)
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 64, TOKENS), jnp.int32)
    views = [
        KVView(
            write_slots=at + first_page * PAGE,
            visible_lo=jnp.maximum(0, at + 1 - (group.window or TOKENS)),
            visible_hi=at + 1,
            block_tables=first_page + jnp.arange(TOKENS // PAGE, dtype=jnp.int32)[None],
            kv_lens=jnp.array([TOKENS], jnp.int32),
        )
        for group in kv_spec(model.config, "float32", PAGE).groups
    ]
    starts = jnp.array([0, TOKENS], jnp.int32)
    return model.layers(model.embed(tokens), pages, at + position, starts, views)[1]


def keys_and_values(model: Transformer, pages: KVPages, first_page: int) -> list[np.ndarray]:
    """What is stored there, layer by layer."""
    group = kv_spec(model.config, "float32", PAGE).groups[0]
    slots = jnp.arange(TOKENS) + first_page * PAGE
    widths = (group.k_width, group.v_width or None)
    held = [gather_slots(layer, slots, widths=widths) for layer in pages.layers]
    return [np.asarray(array) for kv in held for array in kv if array is not None]


@pytest.mark.parametrize("feature", FEATURES)
def test_a_moved_chunk_is_the_chunk_encoded_where_it_goes(feature):
    """In every layer: what is in front of a chunk is all that a move cannot know."""
    model, (near, far) = model_with(feature), (5, 77)
    pages = KVPages.allocate(kv_spec(model.config, "float32", PAGE), 12)
    pages = encode(model, encode(model, pages, 0, near), 3, far)
    slots = np.arange(TOKENS, dtype=np.int32)
    for source, target, shift in ((0, 6, far - near), (3, 9, near - far)):
        shifts: Any = np.full(TOKENS, shift, np.int32)
        src: Any = slots + source * PAGE
        dst: Any = slots + target * PAGE
        pages = move_chunks(model, pages, src, dst, shifts)
    at_near, at_far, moved_far, moved_near = (
        keys_and_values(model, pages, first) for first in (0, 3, 6, 9)
    )
    for moved, encoded in ((moved_far, at_far), (moved_near, at_near)):
        for one, other in zip(moved, encoded, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
    unmoved = max(np.abs(a - b).max() for a, b in zip(at_near, at_far, strict=True))
    assert unmoved > 0.05  # else the above shows nothing


@dataclasses.dataclass(frozen=True)
class EveryRow(CanonicalChunks):
    """Chooses all reused rows again, by the attention that the question pays in every layer."""

    name: ClassVar[str] = "every_row"

    def select(self, prompt: Prompt, hits: Sequence[Hit]) -> StagedPlan:
        everything = Spans(rest_of((), prompt.num_exact, prompt.num_tokens - 1))
        last, count = prompt.model.num_layers, sum(hit.stop - hit.start for hit in hits)
        chosen = TopK("question_attention", count, layers="sum")
        return StagedPlan((Stage(0, last - 1, everything), Stage(last - 1, last, chosen)))


def state(llm: Any, reuse: Any) -> tuple[list[np.ndarray], np.ndarray, Any]:
    """KV of the prompt, logits behind it, and the report, with no prefix cached."""
    llm.reset_prefix_cache()
    with llm.open(PROMPT, SamplingParams(reuse=reuse)) as branch:
        kv = [array for layer in branch.kv() for array in (layer.k, layer.v) if array is not None]
        return kv, branch.logits([3, 4]), branch.reuse


def assert_full_prefill(llm: Any, reuse: Any, full: Any) -> Any:
    kv, logits, report = state(llm, reuse)
    for one, other in zip(kv, full[0], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    np.testing.assert_allclose(logits, full[1], atol=1e-4)
    return report


@pytest.mark.parametrize("feature", EVERY)
def test_running_every_chunk_token_again_is_a_full_prefill(feature):
    llm = llm_with(feature)
    full, naive = state(llm, None), state(llm, "naive")
    differs = max(np.abs(a - b).max() for a, b in zip(full[0], naive[0], strict=True))
    assert differs > 0.01  # else the rest shows nothing
    assert_full_prefill(llm, "epic:k=200", full)
    llm.engine.check_integrity()


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
def test_choosing_or_patching_every_chunk_token_is_a_full_prefill(feature):
    llm = llm_with(feature)
    full = state(llm, None)
    report = assert_full_prefill(llm, EveryRow(), full)
    assert report.groups[-1].recomputed == len(A) + len(B)
    patched = "kamera:rank=30,most=40"
    llm.condition(PROMPT, strategy=patched)
    report = assert_full_prefill(llm, patched, full)
    assert report.patched == len(A) + len(B)
    llm.engine.check_integrity()
