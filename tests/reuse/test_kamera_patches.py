"""What becomes of patches: their bytes are bounded, they serve what they were made for, they stay
when their chunk goes, and they say in the lineage what they are."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from kvjax import LLM, SamplingParams
from kvjax.cache.chunks import ChunkStore, Variant, VariantKey, tokens_hash
from kvjax.cache.pool import PagePool
from kvjax.conditioning import Conditioned
from kvjax.errors import ReuseRefused
from kvjax.request import Chunk, RequestOutput
from kvjax.reuse.kamera import Antecedents, Kamera, low_rank_patch, made_for, signed
from kvjax.reuse.patches import Patches
from kvjax.reuse.report import Fate
from kvjax.reuse.strategy import Hit, KVPatch, ModelFacts, Prompt, Segment
from tests.tiny_model import tiny

A, B, C = "thequickbrownfox", "packmyboxwithjugs", "sphinxofquartz"
SYSTEM, QUESTION = "answerfrom", "whatisinthebox"
PARAMS = SamplingParams(max_tokens=4, temperature=0, logprobs=8)
FULL = "kamera:rank=24,most=40"  # no chunk here is longer
CHUNKS = [SYSTEM, Chunk(A), Chunk(B), Chunk(C), QUESTION]


@pytest.fixture(scope="module")
def engine() -> LLM:
    return tiny(LLM, fresh=True, num_pages=160, max_model_len=256)


@pytest.fixture
def llm(engine) -> LLM:
    """With nothing stored."""
    engine.engine.chunks.store.clear()
    engine.engine.chunks.patches = Patches(engine.engine.chunks.store, 1 << 20)
    engine.reset_prefix_cache()
    return engine


def again(llm: LLM, prompt: Any, spec: str | None) -> RequestOutput:
    out = llm.generate([prompt], dataclasses.replace(PARAMS, reuse=spec))[0]
    llm.engine.check_integrity()
    llm.engine.chunks.patches.check_integrity()
    return out


def run(llm: LLM, prompt: Any, spec: str | None) -> RequestOutput:
    llm.reset_prefix_cache()
    return again(llm, prompt, spec)


def distance(a: RequestOutput, b: RequestOutput) -> float:
    x, y = a.outputs[0].logprobs, b.outputs[0].logprobs
    assert x is not None
    assert y is not None
    if set(x[0]) != set(y[0]):
        return float("inf")
    return max(abs(x[0][i].logprob - y[0][i].logprob) for i in x[0])


def kv_behind(llm: LLM, prompt: Any, spec: str | None, skip: int) -> list[np.ndarray]:
    """Keys and values of a prompt's tokens from `skip` on, layer by layer."""
    llm.reset_prefix_cache()
    with llm.open(prompt, SamplingParams(reuse=spec)) as branch:
        held = branch.kv()
    return [array[skip:] for layer in held for array in (layer.k, layer.v) if array is not None]


# ---- bytes --------------------------------------------------------------------------------------


def stored(pool: PagePool, store: ChunkStore, chunk: str) -> Variant:
    (page,) = pool.allocate(1)
    variant = Variant(VariantKey(None, chunk, ""), np.zeros(4, np.int64), 0, [page], 0)
    assert store.put(variant)
    pool.release([page])
    return variant


def of_bytes(count: int) -> KVPatch:
    return KVPatch(np.zeros((1, count // 4, 1, 1), np.float32), None)


@pytest.fixture
def kept() -> tuple[Patches, Variant, Variant]:
    pool = PagePool(8, 16)
    store = ChunkStore(pool, 8)
    return Patches(store, 1000), stored(pool, store, "a"), stored(pool, store, "b")


def test_the_least_recently_used_patch_goes_when_a_newcomer_needs_its_bytes(kept):
    patches, a, b = kept
    first, second = of_bytes(400), of_bytes(400)
    assert patches.put(a, "p", first)
    assert patches.put(b, "p", second)
    patches.use(a, first)
    assert patches.put(b, "q", of_bytes(200))
    assert patches.put(a, "q", of_bytes(300))
    assert set(a.facts) == {"p", "q"}
    assert set(b.facts) == {"q"}
    stats = patches.stats
    assert (stats.patches, stats.num_bytes, stats.evicted, stats.refused) == (3, 900, 1, 0)
    patches.check_integrity()


def test_a_patch_that_takes_the_place_of_another_needs_only_the_difference(kept):
    patches, a, b = kept
    assert patches.put(a, "p", of_bytes(600))
    assert patches.put(b, "p", of_bytes(400))
    assert patches.put(a, "p", of_bytes(500))
    assert (patches.stats.num_bytes, patches.stats.evicted) == (900, 0)
    patches.check_integrity()


def test_what_cannot_fit_is_refused_and_pushes_nobody_out(kept):
    patches, a, b = kept
    assert patches.put(a, "p", of_bytes(600))
    assert not patches.put(b, "p", of_bytes(1004))
    a.pins = 1
    assert not patches.put(b, "p", of_bytes(500))  # a pinned chunk's stay
    assert (patches.stats.patches, patches.stats.refused) == (1, 2)
    assert "p" not in b.facts
    patches.check_integrity()


def test_conditioning_counts_what_found_no_room(llm):
    one = 4 * 2 * 4 * (len(A) + 256)
    llm.engine.chunks.patches = Patches(llm.engine.chunks.store, one + 64)
    done = llm.condition(CHUNKS, strategy="kamera:rank=4")
    assert (done.made, done.refused) == (1, 2)  # held chunks do not push each other out
    assert llm.engine.chunks.patches.stats.num_bytes <= one + 64


def test_a_patch_is_not_made_that_takes_more_than_the_kv_it_corrects(llm):
    spec = "kamera:rank=16"  # 16 x (17 + 256) numbers a layer for 17 x 256
    done = llm.condition(CHUNKS, strategy=spec)
    assert (done.made, done.declined, done.joint_tokens) == (0, 3, 0)
    assert run(llm, CHUNKS, spec).reuse.patched == 0
    assert llm.condition(CHUNKS, strategy="kamera:rank=12,most=0.9").declined == 1  # C is shorter
    wider = llm.condition([SYSTEM, Chunk(A)], strategy="kamera:rank=65,most=99")
    assert wider.declined == 1  # keys and values come of 64 channels


def test_patches_of_narrow_kv_take_half_the_bytes():
    rng = np.random.default_rng(0)
    alone, behind = (tuple(rng.normal(size=(2, 2, 20, 2, 8)).astype(np.float32)) for _ in "ab")
    wide, narrow = (
        low_rank_patch(alone, behind, 8, 0, dtype) for dtype in (np.float32, np.float16)
    )
    assert narrow.num_bytes * 2 == wide.num_bytes == 4 * 2 * 8 * (20 + 32)
    assert wide.k_left is not None
    assert narrow.k_left is not None
    exact = np.einsum("ltr,lrhw->lthw", wide.k_left, wide.k)
    rounded = np.einsum(
        "ltr,lrhw->lthw", *(x.astype(np.float32) for x in (narrow.k_left, narrow.k))
    )
    np.testing.assert_allclose(rounded, exact, atol=0.02)


def test_patches_have_paid_after_the_prompts_that_break_even():
    done = Conditioned(2, 0, 0, 0, 10, 100, 50, seconds=3.0)
    assert done.break_even(full=0.5, reused=0.25) == 12
    assert done.break_even(full=0.5, reused=0.5) == math.inf


# ---- whom a patch serves ------------------------------------------------------------------------


FACTS = ModelFacts(2, 64, 2048, 512, tag="m")
TEXT, BEFORE, MINE = (1, 2), (3, 4, 5), (6, 7)


def served(patch: KVPatch, *, chunk=MINE, before=BEFORE, text=TEXT, facts=FACTS) -> bool:
    """Whether a patch that lies with a chunk is added to it behind these."""
    tokens = (*text, *before, *chunk, 9)
    first, second = len(text), len(text) + len(before)
    segments = (
        Segment(first, second, tokens_hash(before)),
        Segment(second, len(tokens) - 1, tokens_hash(chunk)),
    )
    prompt, strategy = Prompt(tokens, segments, None, facts), Kamera(rank=1)
    key = VariantKey(None, tokens_hash(chunk), "")
    variant = Variant(key, np.asarray(chunk), 0, [0], 0)
    bound = Antecedents((tokens_hash(before),), (tokens_hash(text), ""))
    variant.facts[strategy.patch_key(bound)] = patch  # as if it were for all of this
    hit = Hit(1, segments[1], variant, second, len(tokens) - 1)
    store = ChunkStore(PagePool(2, 16), 1)
    return strategy.patch(prompt, hit, [hit], store) is patch


def test_a_patch_of_another_chunk_model_or_context_is_not_added():
    bound = Antecedents((tokens_hash(BEFORE),), (tokens_hash(TEXT), ""))
    patch = signed(of_bytes(4), tokens_hash(MINE), "m", bound)
    assert served(patch)
    assert not served(patch, chunk=(6, 8))
    assert not served(patch, facts=FACTS._replace(tag="n"))
    assert not served(patch, before=(3, 4, 6))
    assert not served(patch, text=(2, 2))
    assert not served(of_bytes(4))  # nobody says what it was made for


def test_engines_of_different_weights_have_different_tags(engine):
    other = tiny(LLM, "bfloat16", fresh=True)
    same = tiny(LLM, fresh=True)
    tags = [x.engine.chunks.facts.tag for x in (engine, same, other)]
    assert tags[0] == tags[1] != tags[2]


def test_a_patch_says_what_it_was_made_for(llm):
    llm.condition(CHUNKS, strategy=FULL)
    variant = llm.engine.chunks.store.get(VariantKey(None, tokens_hash(map(ord, C)), ""))
    assert variant is not None
    (patch,) = variant.facts.values()
    a, b, system = (tokens_hash(map(ord, text)) for text in (A, B, SYSTEM))
    made = made_for(patch, variant, llm.engine.chunks.facts.tag)
    assert made == Antecedents((a, b), (system, "", ""))


def test_a_request_without_its_patch_can_be_refused_by_name(llm):
    spec = FULL + ",without=refuse"
    out = run(llm, CHUNKS, spec)
    assert isinstance(out.error, ReuseRefused)
    assert "chunk 1 of the prompt has no kamera:rank=24" in str(out.error)
    llm.condition(CHUNKS, strategy=spec)
    assert run(llm, CHUNKS, spec).reuse.patched == len(A) + len(B) + len(C)
    stale = run(llm, [SYSTEM, Chunk(A), Chunk(C), QUESTION], spec)
    assert "chunk 2 of the prompt" in str(stale.error)
    assert "and 1 patches for something else" in str(stale.error)


def test_a_blend_over_another_patch_of_the_same_name_is_not_found_in_the_cache(llm):
    """The same antecedents in two orders have one name, and the first one made has it."""
    made, asked = ([SYSTEM, *map(Chunk, order), Chunk(C), QUESTION] for order in ((A, B), (B, A)))
    llm.condition(made, strategy=FULL)
    first = run(llm, asked, FULL)
    assert again(llm, asked, FULL).reuse.run_layer_tokens == 2  # found whole
    llm.engine.chunks.store.clear()
    llm.engine.chunks.patches = Patches(llm.engine.chunks.store, 1 << 20)
    llm.condition(asked, strategy=FULL)
    second = again(llm, asked, FULL)
    assert second.reuse.run_layer_tokens > 2
    assert distance(first, second) > 1e-6


# ---- reorder, window, recall --------------------------------------------------------------------


def test_survivors_of_a_window_are_moved_and_nothing_else(llm):
    """What the first chunk left in them stays, as the paper has it: KV is that of the whole text,
    turned back by what went."""
    llm.condition(CHUNKS, strategy=FULL)
    whole = kv_behind(llm, CHUNKS, None, len(SYSTEM + A))
    slid = [SYSTEM, Chunk(B), Chunk(C), QUESTION]
    kept = kv_behind(llm, slid, FULL + ",window=true", len(SYSTEM))
    out = run(llm, slid, FULL + ",window=true")
    assert out.reuse.patched == len(B) + len(C)
    theta = llm.model_config.rope.theta
    angle = len(A) * theta ** (-np.arange(0, 64, 2) / 64)
    tokens = len(B) + len(C)
    for layer in range(2):
        np.testing.assert_allclose(
            kept[2 * layer + 1][:tokens], whole[2 * layer + 1][:tokens], atol=1e-4
        )
        old, new = whole[2 * layer][:tokens], kept[2 * layer][:tokens]
        a, b = old[..., :32], old[..., 32:]
        turned = [a * np.cos(angle) + b * np.sin(angle), b * np.cos(angle) - a * np.sin(angle)]
        np.testing.assert_allclose(new, np.concatenate(turned, axis=-1), atol=1e-4)


@pytest.mark.parametrize(
    ("prompt", "patched"),
    [
        ([SYSTEM, Chunk(C), QUESTION], [C]),  # two went
        ([SYSTEM, Chunk(A), Chunk(C), QUESTION], [A]),  # one from the middle: no window
        ([SYSTEM, Chunk(C), Chunk(B), QUESTION], [C]),  # B never stood behind C
        (["other", Chunk(B), Chunk(C), QUESTION], []),
    ],
    ids=["two", "middle", "order", "text"],
)
def test_only_what_a_window_leaves_keeps_its_patches(llm, prompt, patched):
    llm.condition(CHUNKS, strategy=FULL)
    out = run(llm, prompt, FULL + ",window=true")
    fates, at, found = out.reuse.fates[0], 0, []
    for part in prompt:
        text = part if isinstance(part, str) else part.content
        if not isinstance(part, str) and fates[at] == Fate.PATCHED:
            found.append(text)
        at += len(text)
    assert found == patched


def test_without_a_window_survivors_have_no_patch(llm):
    llm.condition(CHUNKS, strategy=FULL)
    assert run(llm, [SYSTEM, Chunk(B), Chunk(C), QUESTION], FULL).reuse.patched == 0


def test_an_evicted_chunk_is_recalled_by_its_patch_without_a_joint_encoding(llm):
    full = run(llm, CHUNKS, None)
    llm.condition(CHUNKS, strategy=FULL)
    never = run(llm, CHUNKS, FULL)
    llm.engine.chunks.store.clear()
    recalled = run(llm, CHUNKS, FULL)  # encoded alone again, and patched
    assert recalled.reuse.patched == len(A) + len(B) + len(C)
    assert distance(recalled, never) == 0
    assert distance(recalled, full) < 1e-4
    assert llm.condition(CHUNKS, strategy=FULL).found == 3


def test_a_chunk_recalled_behind_others_needs_a_fresh_patch(llm):
    llm.condition([SYSTEM, Chunk(A), Chunk(C), QUESTION], strategy=FULL)
    prompt = [SYSTEM, Chunk(B), Chunk(C), QUESTION]
    assert run(llm, prompt, FULL).reuse.patched == 0
    done = llm.condition(prompt, strategy=FULL)
    assert done.made == 2
    assert distance(run(llm, prompt, FULL), run(llm, prompt, None)) < 1e-4


def test_reordered_antecedents_are_nearer_with_the_patch_than_without(llm):
    made, asked = ([SYSTEM, *map(Chunk, order), Chunk(C), QUESTION] for order in ((A, B), (B, A)))
    llm.condition(made, strategy=FULL)
    at, stop = len(SYSTEM + A + B), len(SYSTEM + A + B + C)
    full, patched, shifted = (kv_behind(llm, asked, spec, at) for spec in (None, FULL, "naive"))

    def error(kv: list[np.ndarray]) -> float:
        return sum(
            float(np.square(a - b)[: stop - at].sum()) for a, b in zip(kv, full, strict=True)
        )

    assert 0 < error(patched) < 0.5 * error(shifted)
