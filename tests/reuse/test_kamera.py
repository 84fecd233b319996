"""Kamera's patches: of full rank they are the joint encoding, and they serve their own set only."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from kvjax import LLM, SamplingParams
from kvjax.cache.chunks import VariantKey, tokens_hash
from kvjax.errors import PromptTooLong
from kvjax.request import Chunk, RequestOutput
from kvjax.reuse import parse
from kvjax.reuse.kamera import Kamera, low_rank_patch, orders
from kvjax.reuse.strategy import KVPatch
from tests.tiny_model import tiny

A = "thequickbrownfoxjumpsover"
B = "packmyboxwithfivedozen"
C = "sphinxofblackquartz"
SYSTEM, QUESTION = "answerfrom", "whatisinthebox"
PARAMS = SamplingParams(max_tokens=4, temperature=0, logprobs=8)
FULL = "kamera:rank=32,most=40"  # no chunk here is longer; a full rank is never worth its bytes


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny(LLM, fresh=True, num_pages=160, max_model_len=256)


def run(llm: LLM, prompt: Any, spec: str | None, **options: Any) -> RequestOutput:
    llm.reset_prefix_cache()
    out = llm.generate([prompt], dataclasses.replace(PARAMS, reuse=spec, **options))[0]
    assert out.error is None
    llm.engine.check_integrity()
    return out


def distance(a: RequestOutput, b: RequestOutput) -> float:
    """Largest difference of log-probabilities at the first token; infinite if others lead."""
    x, y = a.outputs[0].logprobs, b.outputs[0].logprobs
    assert x is not None
    assert y is not None
    if set(x[0]) != set(y[0]):
        return float("inf")
    return max(abs(x[0][i].logprob - y[0][i].logprob) for i in x[0])


def patch_of(llm: LLM, text: str, spec: str, salt: str | None = None) -> KVPatch:
    """The one patch of a chunk that was made with `spec`."""
    variant = llm.engine.chunks.store.get(VariantKey(salt, tokens_hash(map(ord, text)), ""))
    assert variant is not None
    strategy = parse(spec)
    assert isinstance(strategy, Kamera)
    kind = f"kamera:{strategy.rank}:"
    (patch,) = [p for key, p in variant.facts.items() if key.startswith(kind)]
    return patch


@pytest.mark.parametrize(
    "prompt",
    [
        [SYSTEM, Chunk(A), Chunk(B), Chunk(C), QUESTION],
        [Chunk(A), Chunk(B), QUESTION],  # the first has no antecedents
        [SYSTEM, Chunk(A), "andthen", Chunk(B), QUESTION],
        [SYSTEM, Chunk("x"), Chunk("y"), QUESTION],
        [SYSTEM, Chunk(A), Chunk(A), QUESTION],
        [SYSTEM, Chunk(A), Chunk(B)],
    ],
    ids=["three", "leading", "hole", "one-token", "twice", "no-question"],
)
def test_a_patch_of_full_rank_is_the_joint_encoding(llm, prompt):
    full = run(llm, prompt, None)
    done = llm.condition(prompt, strategy=FULL)
    assert done.refused == 0
    out = run(llm, prompt, FULL)
    assert out.outputs[0].token_ids == full.outputs[0].token_ids
    assert distance(out, full) < 1e-4
    assert distance(run(llm, prompt, "naive"), full) > 1e-4  # else the above shows nothing
    assert out.reuse.shifted == out.reuse.recomputed == 0
    assert out.reuse.patched > 0


def test_layer_0_needs_no_patch(llm):
    """There KV depends on the token and its position alone."""
    llm.condition([SYSTEM, Chunk("jackdawslovemybig"), QUESTION], strategy="kamera:rank=20,most=40")
    patch = patch_of(llm, "jackdawslovemybig", "kamera:rank=20,most=40")
    assert patch.k_left is not None
    added = np.einsum("ltr,lrhw->lthw", patch.k_left, patch.k)
    assert np.abs(added[0]).max() < 1e-4
    assert np.abs(added[1]).max() > 0.01


def test_more_rank_is_nearer_to_the_joint_encoding():
    rng = np.random.default_rng(0)
    alone, behind = (tuple(rng.normal(size=(2, 2, 12, 2, 8)).astype(np.float32)) for _ in "ab")
    errors = []
    for rank in (1, 4, 8, 12):
        p = low_rank_patch(alone, behind, rank)
        assert p.v is not None
        assert p.k_left is not None
        assert p.v_left is not None
        parts = zip(alone, behind, (p.k, p.v), (p.k_left, p.v_left), strict=True)
        errors.append(
            sum(np.square(a + np.einsum("ltr,lrhw->lthw", left, right) - b).sum()
                for a, b, right, left in parts)
        )  # fmt: skip
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1
    assert errors[-1] < 1e-6


@pytest.mark.parametrize("tokens", [5, 40])
def test_no_patch_of_its_rank_is_nearer(tokens):
    """What is left are the singular values behind its rank (Eckart and Young)."""
    rng = np.random.default_rng(1)
    zero, k, v = np.zeros((3, 1, tokens, 2, 4), np.float32)
    k, v = (rng.normal(size=k.shape).astype(np.float32) for _ in "kv")
    patch = low_rank_patch((zero, zero), (k, v), 2)
    assert patch.k_left is not None
    assert patch.v is not None
    joined = np.concatenate([x.reshape(tokens, -1) for x in (k, v)], axis=1)
    right = np.concatenate([x.reshape(2, -1) for x in (patch.k, patch.v)], axis=1)
    rest = np.linalg.norm(joined - patch.k_left[0] @ right)
    values = np.linalg.svd(joined, compute_uv=False)
    np.testing.assert_allclose(rest, np.linalg.norm(values[2:]), rtol=1e-5)


def test_the_truncated_patch_keeps_the_largest_direction():
    """Deltas 3 and 1 in orthogonal directions: rank 1 keeps the 3, and nothing of the 1."""
    zero = np.zeros((1, 2, 1, 2), np.float32)
    delta = zero.copy()
    delta[0, 0, 0, 0], delta[0, 1, 0, 1] = 3, 1
    patch = low_rank_patch((zero, zero), (delta, zero), 1)
    assert patch.k_left is not None
    added = np.einsum("ltr,lrhw->lthw", patch.k_left, patch.k)
    np.testing.assert_allclose(added[0, :, 0], [[3, 0], [0, 0]], atol=1e-6)


def test_a_latent_is_patched_without_values():
    zero = np.zeros((1, 3, 1, 4), np.float32)
    patch = low_rank_patch((zero, None), (zero + 1, None), 3)
    assert patch.v is None
    assert patch.k_left is not None
    np.testing.assert_allclose(np.einsum("ltr,lrhw->lthw", patch.k_left, patch.k), 1, rtol=1e-6)


def test_shallow_layers_get_no_patch(llm):
    spec = "kamera:rank=21,shallow=1,most=40"
    prompt = [SYSTEM, Chunk(C), QUESTION]
    done = llm.condition(prompt, strategy=spec)
    patch = patch_of(llm, C, spec)
    assert (patch.l0, patch.k.shape[0]) == (1, 1)
    assert done.patch_bytes == patch.num_bytes == 21 * (len(C) + 256) * 4
    full = run(llm, prompt, None)  # layer 0 needs no patch
    assert distance(run(llm, prompt, spec), full) < 1e-4


STALE = {
    "another": [SYSTEM, Chunk(A), Chunk(C), QUESTION],
    "one-more": [SYSTEM, Chunk(A), Chunk(B), Chunk("zz"), Chunk(C), QUESTION],
    "one-less": [SYSTEM, Chunk(B), Chunk(C), QUESTION],
    "twice": [SYSTEM, Chunk(A), Chunk(B), Chunk(B), Chunk(C), QUESTION],
    "other-text": ["from", Chunk(A), Chunk(B), Chunk(C), QUESTION],
}


@pytest.mark.parametrize("prompt", STALE.values(), ids=STALE.keys())
def test_a_stale_patch_is_refused(llm, prompt):
    there = llm.condition([SYSTEM, *map(Chunk, (A, B, C))], strategy=FULL, cache_salt="stale")
    assert there.made + there.found == 3
    out = run(llm, prompt, FULL, cache_salt="stale")
    start = sum(len(p if isinstance(p, str) else p.content) for p in prompt[:-2])
    fates = out.reuse.fates[0][start : start + len(C)]
    assert set(fates.tolist()) == {1}  # moved as it is
    computed = run(llm, prompt, FULL + ",without=compute", cache_salt="stale")
    assert set(computed.reuse.fates[0][start : start + len(C)].tolist()) == {4}


def test_a_patch_of_one_rank_or_tenant_does_not_serve_another(llm):
    prompt = [SYSTEM, Chunk(A), Chunk(B), QUESTION]
    llm.condition(prompt, strategy=FULL, cache_salt="a")
    assert run(llm, prompt, FULL, cache_salt="a").reuse.patched == len(A) + len(B)
    assert run(llm, prompt, FULL, cache_salt="b").reuse.patched == 0
    assert run(llm, prompt, "kamera:rank=31,most=40", cache_salt="a").reuse.patched == 0


def test_a_patch_serves_the_same_antecedents_in_another_order(llm):
    made, asked = ([SYSTEM, *map(Chunk, order), Chunk(C), QUESTION] for order in ((A, B), (B, A)))
    llm.condition(made, strategy=FULL, cache_salt="order")
    out = run(llm, asked, FULL, cache_salt="order")
    assert out.reuse.patched == len(C)  # A and B changed places: they have other antecedents


def test_an_orbit_patch_is_the_mean_over_orders_which_are_near_each_other(llm):
    deltas = []
    for rank, order, orbit in ((32, (A, B), 1), (33, (B, A), 1), (34, (A, B), 2)):
        spec = f"kamera:rank={rank},orbit={orbit},most=40"
        llm.condition([SYSTEM, *map(Chunk, order), Chunk(C)], strategy=spec, cache_salt="orbit")
        patch = patch_of(llm, C, spec, "orbit")
        assert patch.k_left is not None
        deltas.append(np.einsum("ltr,lrhw->lthw", patch.k_left, patch.k))
    one, other, orbit = deltas
    np.testing.assert_allclose(orbit, (one + other) / 2, atol=1e-4)
    assert 1e-3 < np.linalg.norm(one - other) < np.linalg.norm(other)


def test_orders_are_different_and_begin_with_the_given_one():
    assert list(orders(0, 3)) == [()]
    assert sorted(orders(3, 6)) == sorted(orders(3, 100))
    drawn = list(orders(5, 7))
    assert len(set(drawn)) == 7
    assert drawn[0] == (0, 1, 2, 3, 4)
    assert drawn == list(orders(5, 7))


def test_bytes_are_counted_and_patches_are_made_once(llm):
    prompt = [SYSTEM, Chunk(A), Chunk(B), QUESTION]
    done = llm.condition(prompt, strategy="kamera:rank=4", cache_salt="bytes")
    # Per layer and chunk: rank x (tokens + keys and values of 2 heads of 64), in float32.
    assert done.patch_bytes == 2 * 4 * 4 * (len(A) + len(B) + 2 * 256)
    assert done.kv_bytes == (len(A) + len(B)) * 2 * 256 * 4
    assert done.joint_tokens == len(SYSTEM + A + B)
    again = llm.condition(prompt, strategy="kamera:rank=4", cache_salt="bytes")
    assert (again.made, again.found, again.joint_tokens) == (0, 2, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [("rank=0", "at least 1"), ("shallow=-1", "at least 0"), ("orbit=0", "at least 1"),
     ("most=-1", "at least 0"), ("without=drop", "without must be"), ("window=1", "bool")],
)  # fmt: skip
def test_wrong_options_are_refused(llm, options, message):
    with pytest.raises(ValueError, match=message):
        llm.condition([Chunk(A)], strategy=f"kamera:{options}")


def test_what_cannot_be_conditioned_is_refused(llm):
    with pytest.raises(ValueError, match="marks no chunk"):
        llm.condition(SYSTEM)
    with pytest.raises(ValueError, match="only kamera"):
        llm.condition([Chunk(A)], strategy="epic")
    with pytest.raises(PromptTooLong):
        llm.condition([SYSTEM, Chunk("x" * 300)])
