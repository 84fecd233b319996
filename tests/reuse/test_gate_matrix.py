"""Exactness gates of every strategy over every arrangement of chunks, on the KV itself.

Prompts have at most 33 tokens: every staged plan then runs in the smallest program of its kind.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from kvjax import LLM, SamplingParams
from kvjax.errors import PromptTooLong
from kvjax.request import Chunk
from kvjax.reuse import STRATEGIES, parse
from kvjax.reuse.report import Fate
from tests.tiny_model import tiny

A, B, SYSTEM, QUESTION = "the keeper", "is Farid", "go: ", "who is?"
ARRANGEMENTS: dict[str, list[Any]] = {
    "chunks": [SYSTEM, Chunk(A), Chunk(B), QUESTION],
    "another order": [SYSTEM, Chunk(B), Chunk(A), QUESTION],
    "hole": [SYSTEM, Chunk(A), " & ", Chunk(B), QUESTION],
    "one token": [SYSTEM, Chunk("x"), Chunk(A), Chunk("y"), QUESTION],
    "twice": [SYSTEM, Chunk(A), Chunk(A), QUESTION],
    "nothing behind": [SYSTEM, Chunk(A), Chunk(B)],
    "nothing but chunks": [Chunk(B), Chunk(A)],
    "alone": [Chunk(A)],
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A strategy at a small budget, and with everything run again (None: it never does that)."""

    some: str
    whole: str | None


CASES = {
    "naive": Case("naive", None),
    "epic": Case("epic:k=2", "epic:k=99"),
    "epic, dummies": Case("epic:k=0,sink=1", "epic:k=99,sink=1"),
    "cacheblend": Case("cacheblend:ratio=0.3,check_layer=0", "cacheblend:ratio=1"),
    "fusionrag": Case("fusionrag:ratio=0.3", "fusionrag:ratio=1"),
    "cachecraft": Case("cachecraft:ratio=0.3", "cachecraft:ratio=1"),
    "cacheclip": Case("cacheclip:ratio=0.3,least=1,window=2", "cacheclip:ratio=1"),
    "kvcomm": Case("kvcomm:gamma=1", "kvcomm:gamma=0"),
    "relaycaching": Case("relaycaching:detect=1,most=0.3", "relaycaching:detect=2"),
    "kamera": Case("kamera:rank=2,most=99", "kamera:rank=10,most=99"),
    "tablecache": Case("tablecache", None),
    "hcache": Case("hcache", "hcache"),
    "cachetune": Case("cachetune:ratio=0.3", "cachetune:ratio=1"),
    "kvshare": Case("kvshare:ratio=0.3,check_layer=0", "kvshare:ratio=1"),
    "random": Case("random:ratio=0.3", "random:ratio=1"),
    "oracle": Case("oracle:ratio=0.3", "oracle:ratio=1"),
}
WHOLE = [name for name, case in CASES.items() if case.whole is not None]


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    """Nothing here depends on how well XLA optimises, and the time goes into compiling."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny(LLM, fresh=True, num_pages=96, max_model_len=64)


@dataclasses.dataclass(frozen=True)
class State:
    """What a prompt left: KV by layer, logits behind it, the report, and what was moved."""

    kv: list[tuple[np.ndarray, np.ndarray]]
    logits: np.ndarray
    report: Any
    moved: list[tuple[Any, tuple[np.ndarray, np.ndarray | None]]]


def params(spec: str | None, learn: bool, prompt: list[Any]) -> SamplingParams:
    length = sum(len(p.content if isinstance(p, Chunk) else p) for p in prompt)
    extra: dict[str, Any] = {"learn": learn}
    if spec is not None and spec.startswith("oracle"):
        extra = {"oracle": list(range(length))}
    return SamplingParams(reuse=spec, extra_args=extra, temperature=0, max_tokens=3)


def state(llm: LLM, prompt: list[Any], spec: str | None, cold: bool = True) -> State:
    if cold:
        llm.reset_prefix_cache()
    with llm.open(prompt, params(spec, False, prompt)) as branch:
        kv = []
        for layer in branch.kv():
            assert layer.v is not None
            kv.append((layer.k, layer.v))
        assembly, size = branch._sequence.assembly, llm.engine.spec.page_size
        moved = []
        for move in () if assembly is None else assembly.moves:
            if move.variant.page_ids and move.patch is None:
                count = move.stop - move.start
                slots = move.variant.slots(move.offset, move.offset + count, size)
                moved.append((move, llm.engine.runner.read(slots, move.shift)))
        return State(kv, branch.logits(), branch.reuse, moved)


def prepare(llm: LLM, prompt: list[Any], spec: str) -> None:
    """Gives the strategy what it learns from: earlier prompts of the same shape, patches."""
    strategy, chunks = parse(spec), [p for p in prompt if isinstance(p, Chunk)]
    if strategy.name == "kamera":
        llm.condition(prompt, strategy=spec)
    elif strategy.name == "kvcomm":
        for letter in "jkq":
            other = [Chunk(letter * len(str(p.content))) if isinstance(p, Chunk) else p
                     for p in prompt]  # fmt: skip
            llm.generate([other], params(spec, True, prompt))
    elif strategy.name == "fusionrag":
        llm.chunks.put([*chunks, Chunk("Farid the keeper")], strategy=spec)
    else:
        llm.chunks.put(chunks, strategy=spec)
    llm.generate([prompt], params(spec, False, prompt))  # whose chunks are encoded


def assert_close(one: State, other: State, rows: Any = slice(None)) -> None:
    for mine, theirs in zip(one.kv, other.kv, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(a[rows], b[rows], atol=1e-4)


@functools.cache
def full_prefill(llm: LLM, name: str) -> State:
    return state(llm, ARRANGEMENTS[name], None)


def test_every_strategy_has_its_gates():
    """One that is added has to be; what is wrong by design, or reuses exact prefixes only, not."""
    tested = {parse(case.some).name for case in CASES.values()}
    assert tested == set(STRATEGIES) - {"prefix", "naive_no_rotation"}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("case", CASES)
def test_layer_0_is_a_full_prefills_and_what_is_shifted_is_what_is_stored(llm, case, arrangement):
    """In layer 0 KV depends on a token and its place alone: an index mix-up shows there. A shift by
    itself changes nothing in any layer."""
    spec, prompt = CASES[case].some, ARRANGEMENTS[arrangement]
    prepare(llm, prompt, spec)
    found, full = state(llm, prompt, spec), full_prefill(llm, arrangement)
    for mine, theirs in zip(found.kv[0], full.kv[0], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)
    fates = found.report.fates
    assert fates.shape[1] == len(full.kv[0][0])
    assert fates[-1, -1] >= Fate.RECOMPUTED or arrangement == "alone"
    for move, stored in found.moved:
        kept = (fates[:, move.start : move.stop] < Fate.RECOMPUTED).all(axis=0)
        for layer, (k, v) in enumerate(found.kv):
            for mine, theirs in ((k, stored[0]), (v, stored[1])):
                assert theirs is not None
                here = mine[move.start : move.stop]
                np.testing.assert_allclose(here[kept], theirs[layer][kept], atol=1e-4)
    llm.engine.check_integrity()


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("case", WHOLE)
def test_everything_run_again_is_a_full_prefill_in_every_layer(llm, case, arrangement):
    """Of Kamera: everything patched, at full rank."""
    spec, prompt = str(CASES[case].whole), ARRANGEMENTS[arrangement]
    prepare(llm, prompt, spec)
    found, full = state(llm, prompt, spec), full_prefill(llm, arrangement)
    assert_close(found, full)
    np.testing.assert_allclose(found.logits, full.logits, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_chunks_behind_an_exact_prefix_that_ends_in_one_keep_their_places(llm, case):
    """The index mix-up that the field knows best."""
    prompt, full = ARRANGEMENTS["chunks"], full_prefill(llm, "chunks")
    for spec in filter(None, (CASES[case].some, CASES[case].whole)):
        prepare(llm, prompt, spec)
        llm.reset_prefix_cache()
        llm.generate([SYSTEM + A[:4]], SamplingParams(max_tokens=1))
        found = state(llm, prompt, spec, cold=False)
        exact = len(SYSTEM + A[:4])
        assert (found.report.fates[:, : exact - 1] == Fate.EXACT).all()
        assert_close(found, full, slice(exact))
        np.testing.assert_allclose(found.kv[0][0], full.kv[0][0], atol=1e-4)
        if spec == CASES[case].whole:
            assert_close(found, full)


@pytest.mark.parametrize("case", CASES)
def test_a_prompt_that_is_an_exact_prefix_is_a_full_prefill(llm, case):
    prompt, full = ARRANGEMENTS["chunks"], full_prefill(llm, "chunks")
    llm.reset_prefix_cache()
    llm.generate([prompt], SamplingParams(max_tokens=1))
    found = state(llm, prompt, CASES[case].some, cold=False)
    assert found.report.exact == found.report.num_tokens - 1
    for mine, theirs in zip(found.kv, full.kv, strict=True):
        np.testing.assert_array_equal(mine[0], theirs[0])
    np.testing.assert_array_equal(found.logits, full.logits)


@pytest.mark.parametrize("case", CASES)
def test_the_same_prompt_asked_exactly_afterwards_is_cold(llm, case):
    prompt, full = ARRANGEMENTS["chunks"], full_prefill(llm, "chunks")
    spec = CASES[case].some
    prepare(llm, prompt, spec)
    llm.reset_prefix_cache()
    (blend,) = llm.generate([prompt], params(spec, False, prompt))
    moved = np.isin(blend.reuse.fates, (Fate.SHIFTED, Fate.PATCHED, Fate.RECOMPUTED)).any(axis=0)
    exact = int(np.argmax(moved)) if moved.any() else moved.size
    (out,) = llm.generate([prompt], params(None, False, prompt))
    assert out.num_cached_tokens <= exact  # no approximate page was hit
    found = state(llm, prompt, None, cold=False)
    assert_close(found, full)
    np.testing.assert_allclose(found.logits, full.logits, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_requests_that_share_a_chunk_at_once_answer_as_alone_and_leave_it_as_it_is(llm, case):
    spec = CASES[case].some
    asked = [[SYSTEM, Chunk(A), Chunk(B), text] for text in ("who is?", "what is", "whereis")]
    for prompt in asked:
        prepare(llm, prompt, spec)

    def stored() -> dict[Any, bytes]:
        runner, size, kept = llm.engine.runner, llm.engine.spec.page_size, {}
        for variant in llm.engine.chunks.store:
            if variant.page_ids:
                spans = runner.export(variant.slots(0, variant.num_tokens, size))
                kept[variant.key] = b"".join(np.asarray(x).tobytes() for s in spans for x in s[:2])
        return kept

    before, alone = stored(), []
    for prompt in asked:
        llm.reset_prefix_cache()
        alone.append(llm.generate([prompt], params(spec, False, prompt))[0])
    llm.reset_prefix_cache()
    together = llm.generate(asked, [params(spec, False, prompt) for prompt in asked])
    for one, other in zip(alone, together, strict=True):
        assert one.error is None
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        chunks = slice(len(SYSTEM), len(SYSTEM + A + B))
        assert (one.reuse.fates[:, chunks] == other.reuse.fates[:, chunks]).all()
    after = stored()
    assert {key: after.get(key) for key in before} == before
    llm.engine.check_integrity()


@pytest.mark.parametrize("case", CASES)
def test_a_chunk_that_the_store_has_no_room_for_is_computed_like_text(llm, case):
    prompt, full = ARRANGEMENTS["chunks"], full_prefill(llm, "chunks")
    store = llm.engine.chunks.store
    store.clear()
    capacity, store.capacity_pages = store.capacity_pages, 0
    try:
        found = state(llm, prompt, CASES[case].some)
    finally:
        store.capacity_pages = capacity
    assert_close(found, full)
    np.testing.assert_allclose(found.logits, full.logits, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_chunk_larger_than_the_context_is_refused_before_any_work(llm, case):
    chunk = Chunk("y" * llm.engine.limits.max_model_len)
    before = llm.chunks.stats
    with pytest.raises(PromptTooLong, match="max_model_len=64 allows 63"):
        llm.generate([[SYSTEM, chunk]], params(CASES[case].some, False, [SYSTEM, chunk]))
    with pytest.raises(PromptTooLong):
        llm.chunks.put([chunk], strategy=CASES[case].some)
    assert llm.chunks.stats == before
    assert not llm.engine.has_work
