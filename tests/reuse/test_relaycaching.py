"""What decoding wrote is reused where it is quoted: the KV, its lineage, its tenant, its stages."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import LLM, SamplingParams
from kvjax.cache.chunks import Variant, VariantKey, tokens_hash
from kvjax.request import Chunk, RequestOutput
from kvjax.reuse import scores
from kvjax.reuse.plan import Spans, StagedPlan, TopK
from kvjax.reuse.relaycaching import RelayCaching
from kvjax.reuse.scores import Layer, value_angle
from kvjax.reuse.strategy import Hit, ModelFacts, Prompt, Segment
from tests.reuse.families import deep_llm, deep_model
from tests.tiny_model import END, tiny

FIRST, SYSTEM, QUESTION = "thequickbrownfox", "answerfrom", "whatisinthebox"
DOCUMENT = "packmyboxwithfivedozenliquorjugs"
GREEDY = SamplingParams(max_tokens=21, temperature=0, ignore_eos=True)
PARAMS = SamplingParams(max_tokens=4, temperature=0, logprobs=8)
RELAY = "relaycaching:detect=1"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny(LLM, fresh=True, num_pages=160, max_model_len=256)


def relay(
    llm: LLM, prompt: Any = FIRST, entering: int | None = None, **options: Any
) -> tuple[int, ...]:
    """Tokens of one output that is kept."""
    (out,) = llm.relay([prompt], dataclasses.replace(GREEDY, **options), entering=entering)
    assert out.error is None
    llm.engine.check_integrity()
    return out.outputs[0].token_ids


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


def written(llm: LLM, tokens: tuple[int, ...], salt: str | None = None) -> list[Variant]:
    return [
        variant
        for variant in llm.engine.chunks.store.variants(salt, tokens_hash(tokens)).values()
        if variant.facts.get("born") == "decode"
    ]


def test_kv_that_decoding_wrote_is_that_of_a_prefill(llm):
    tokens = relay(llm, cache_salt="kv")
    (variant,) = written(llm, tokens, "kv")
    assert (*variant.tokens, *variant.tail) == tokens
    assert len(variant.tail) <= 1
    llm.reset_prefix_cache()
    context = tuple(map(ord, FIRST))
    assert variant.context_ids == context
    llm.engine.chunks.put(tokens, context, "kv2")
    while llm.engine.has_work:
        llm.engine.step()
    (prefilled,) = llm.engine.chunks.store.variants("kv2", tokens_hash(tokens)).values()
    count = variant.num_tokens
    for a, b in zip(
        llm.engine.chunks.read(variant), llm.engine.chunks.read(prefilled), strict=True
    ):
        assert a is not None
        assert b is not None
        np.testing.assert_allclose(a, b[:, :count], atol=1e-4)


def test_a_quoted_output_is_hit_and_only_text_runs_above_the_range(llm):
    tokens = relay(llm)
    out = run(llm, [SYSTEM, Chunk(tokens), QUESTION], RELAY + ",end=1")
    (variant,) = written(llm, tokens)
    assert out.reuse.copied_tokens == variant.num_tokens
    lower, upper = out.reuse.groups
    assert (lower.l0, lower.l1, upper.l0, upper.l1) == (0, 1, 1, 2)
    assert lower.recomputed == variant.num_tokens
    assert (upper.recomputed, upper.shifted) == (0, variant.num_tokens)
    assert upper.computed == len(SYSTEM) + len(QUESTION) + len(variant.tail)


def test_what_deviates_is_run_again_within_the_bound(llm):
    tokens = relay(llm)
    prompt = [SYSTEM, Chunk(tokens), QUESTION]
    (variant,) = written(llm, tokens)
    counts = [
        run(llm, prompt, f"{RELAY},threshold={t},influence=0,most={m}").reuse.groups[-1].recomputed
        for t, m in ((0, 1), (0, 0.25), (1.5, 1), (1000, 1))
    ]
    count = variant.num_tokens
    assert counts[:2] == [count, int(0.25 * count)]
    assert counts[3] == 0
    assert counts[2] < count


QUOTES = {
    "one": lambda t: [SYSTEM, Chunk(t), QUESTION],
    "behind-a-document": lambda t: [SYSTEM, Chunk(DOCUMENT), Chunk(t), QUESTION],
    "before-it": lambda t: [SYSTEM, Chunk(t), Chunk(DOCUMENT), QUESTION],
    "twice": lambda t: [Chunk(t), Chunk(t), "x"],
    "at-the-end": lambda t: [SYSTEM, Chunk("y"), Chunk(t)],
}
EVERY_ROW, STAGED = "relaycaching:detect=2", f"{RELAY},threshold=0,most=1"


@pytest.mark.parametrize(
    ("make", "spec"),
    [pytest.param(make, EVERY_ROW, id=name) for name, make in QUOTES.items()]
    + [
        pytest.param(make, STAGED, id=f"staged-{name}", marks=[pytest.mark.slow] * (name != "one"))
        for name, make in QUOTES.items()
    ],
)
def test_running_everything_is_a_full_prefill(llm, make, spec):
    prompt = make(relay(llm))
    full = run(llm, prompt, None)
    out = run(llm, prompt, spec)
    assert distance(out, full) < 1e-4
    assert out.outputs[0].token_ids == full.outputs[0].token_ids


def test_reuse_without_recompute_is_no_full_prefill(llm):
    prompt = [SYSTEM, Chunk(relay(llm)), QUESTION]
    assert distance(run(llm, prompt, RELAY + ",end=1"), run(llm, prompt, None)) > 1e-4


def test_an_output_behind_its_own_prompt_is_exact(llm):
    tokens = relay(llm)
    prompt = [FIRST, Chunk(tokens), QUESTION]
    out = run(llm, prompt, RELAY)
    (variant,) = written(llm, tokens)
    assert out.reuse.exact == variant.num_tokens
    assert distance(out, run(llm, prompt, None)) < 1e-4


def test_the_output_of_an_approximate_prompt_is_never_exact(llm):
    prompt = [SYSTEM, Chunk(DOCUMENT), QUESTION]
    llm.reset_prefix_cache()
    tokens = relay(llm, prompt, reuse="naive", cache_salt="blend")
    (variant,) = written(llm, tokens, "blend")
    assert variant.lineage != "exact"
    out = run(llm, [SYSTEM + DOCUMENT + QUESTION, Chunk(tokens), "x"], RELAY, cache_salt="blend")
    assert out.reuse.exact == 0
    assert out.reuse.copied_tokens == variant.num_tokens


def test_outputs_of_one_tenant_do_not_serve_another(llm):
    tokens = relay(llm, cache_salt="a")
    assert written(llm, tokens, "a")
    assert not written(llm, tokens, "b")


def test_every_completion_is_kept_and_nothing_leaks(llm):
    params = dataclasses.replace(GREEDY, n=3, temperature=1.0, seed=5, cache_salt="n")
    (out,) = llm.relay(["abc"], params)
    assert all(written(llm, completion.token_ids, "n") for completion in out.outputs)
    llm.engine.check_integrity()
    assert not llm.engine._parked


def test_an_output_is_found_without_its_end_token_too(llm):
    tokens = relay(llm, ignore_eos=False, min_tokens=5, logit_bias={END: 100.0}, cache_salt="ended")
    assert tokens[-1] == END
    (whole,), (bare,) = (written(llm, t, "ended") for t in (tokens, tokens[:-1]))
    assert tuple(bare.tokens) == tokens[:-1]
    assert bare.tail == ()
    assert whole.base == bare.base


def test_value_angle_is_one_minus_the_cosine():
    old = jnp.array([[[1.0, 0.0]], [[1.0, 0.0]], [[2.0, 0.0]], [[0.0, 0.0]]])
    new = jnp.array([[[3.0, 0.0]], [[0.0, 5.0]], [[1.0, 1.0]], [[0.0, 0.0]]])
    ids, indices = jnp.array([2, 0, 1, -1]), jnp.arange(4)
    unused: Any = None
    layer = Layer(unused, 0, unused, unused, unused, unused, ids, indices, unused, unused,
                  (old, old), (old, new))  # fmt: skip
    expected = [1.0, 1 - 1 / math.sqrt(2), 0.0, 0.0]
    np.testing.assert_allclose(value_angle(layer), expected, atol=1e-6)


def staged(strategy: RelayCaching, prompt: Prompt, hits: list[Hit]) -> StagedPlan:
    plan = strategy.select(prompt, hits)
    assert isinstance(plan, StagedPlan)
    return plan


def test_stages_are_the_layer_range():
    prompt = Prompt(tuple(range(30)), (Segment(5, 25, "c"),), None, ModelFacts(12, 8, 1, 1), 2)
    variant = Variant(VariantKey(None, "c", ""), np.zeros(20, np.int64), 0, [0], 0)
    hit = Hit(0, prompt.segments[0], variant, 5, 25)
    plan = staged(RelayCaching(detect=3, end=9, most=0.4), prompt, [hit])
    assert [(s.l0, s.l1) for s in plan.stages] == [(0, 3), (3, 9), (9, 12)]
    assert plan.stages[0].rows == Spans(((2, 29),))
    union = "deviation_or_influence:1.5,1.45,10"
    assert plan.stages[1].rows == TopK(union, 8, floor=1.0)
    assert plan.stages[2].rows == TopK(union, 0)
    plan = staged(RelayCaching(influence=0), prompt, [hit])
    assert plan.stages[1].rows == TopK("value_angle", 10, 1.5)


def test_what_is_stored_enters_at_start_and_the_rest_comes_from_the_embeddings():
    segments = (Segment(5, 15, "c"), Segment(15, 25, "d"))
    prompt = Prompt(tuple(range(30)), segments, None, ModelFacts(12, 8, 1, 1), 2)
    written, plain = (
        Variant(VariantKey(None, name, ""), np.zeros(10, np.int64), 0, [0], 0) for name in "cd"
    )
    hits = [Hit(0, segments[0], written, 5, 15), Hit(1, segments[1], plain, 15, 25)]
    strategy = RelayCaching(start=2, detect=4, end=9)
    assert [s.l0 for s in staged(strategy, prompt, hits).stages] == [0, 4, 9]
    written.arrays["entering:2"] = np.zeros((10, 8), np.float32)
    plan = staged(strategy, prompt, hits)
    assert [(s.l0, s.l1, s.hidden) for s in plan.stages] == [
        (0, 2, None), (2, 4, "entering:2"), (4, 9, None), (9, 12, None),
    ]  # fmt: skip
    assert plan.stages[0].rows == Spans(((2, 5), (15, 29)))
    assert plan.stages[1].rows == Spans(((2, 29),))


BELOW = "relaycaching:start=1,detect=2"


@pytest.fixture(scope="module")
def deep() -> LLM:
    """Of three layers, so that there is one below, in and above a range."""
    return deep_llm()


def test_what_is_kept_is_what_enters_the_layer(deep):
    """Layer 1 of a full prefill has the keys and values that the kept states give."""
    tokens = relay(deep, entering=1, cache_salt="enter")
    (variant,) = written(deep, tokens, "enter")
    rows = variant.arrays["entering:1"]
    assert rows.shape == (variant.num_tokens, 64)
    positions = variant.base + jnp.arange(variant.num_tokens)
    _, k, v = deep_model().project(1, jnp.asarray(rows), positions)
    assert v is not None
    stored_k, stored_v = deep.engine.chunks.read(variant)  # keys turned back to positions from 0
    _, turned, _ = deep_model().project(1, jnp.asarray(rows), positions - variant.base)
    assert stored_v is not None
    np.testing.assert_allclose(v, stored_v[1], atol=1e-4)
    np.testing.assert_allclose(turned, stored_k[1], atol=1e-4)
    assert np.abs(np.asarray(k) - turned).max() > 0.01


def test_beginning_mid_stack_behind_its_own_context_is_a_full_prefill(deep):
    """There what is stored is what enters; a prefix in front keeps the hit from being exact."""
    tokens = relay(deep, entering=1, cache_salt="own")
    prompt = [FIRST, Chunk(tokens), Chunk(DOCUMENT), QUESTION]
    full = run(deep, prompt, None, cache_salt="own")
    spec = f"{BELOW},threshold=0,most=1"
    assert distance(run(deep, prompt, spec, cache_salt="own"), full) < 1e-4


@pytest.mark.slow
def test_beginning_mid_stack_runs_quoted_tokens_in_the_range_alone(deep):
    tokens = relay(deep, entering=1, cache_salt="mid")
    prompt = [SYSTEM, Chunk(tokens), QUESTION]
    spec = f"{BELOW},end=2"
    out = run(deep, prompt, spec, cache_salt="mid")
    (variant,) = written(deep, tokens, "mid")
    count = variant.num_tokens
    assert [(g.l0, g.l1, g.recomputed, g.shifted) for g in out.reuse.groups] == [
        (0, 1, 0, count), (1, 2, count, 0), (2, 3, 0, count),
    ]  # fmt: skip
    from_embeddings = run(deep, prompt, "relaycaching:detect=2,end=2", cache_salt="mid")
    assert out.reuse.run_layer_tokens == from_embeddings.reuse.run_layer_tokens - count
    full = run(deep, prompt, None, cache_salt="mid")
    assert 1e-4 < distance(out, full) < 1


def test_a_layer_that_is_not_there_is_refused(deep):
    for entering in (0, 3):
        with pytest.raises(ValueError, match=r"entering must be a layer in 1\.\.2"):
            deep.relay([FIRST], GREEDY, entering=entering)


@pytest.mark.slow
def test_influence_adds_what_the_question_attends_to(llm):
    tokens = relay(llm)
    prompt = [SYSTEM, Chunk(tokens), QUESTION]
    (variant,) = written(llm, tokens)
    everything, nothing = (
        run(llm, prompt, f"{RELAY},threshold=1000,influence={i},most=1").reuse.groups[-1].recomputed
        for i in (1e-6, 1000)
    )
    assert (everything, nothing) == (variant.num_tokens, 0)
    union, alone = (
        run(llm, prompt, f"{RELAY},threshold=1.5,influence={i},most=1").reuse.groups[-1].recomputed
        for i in (1.0, 1000)
    )
    assert variant.num_tokens > union > alone > 0


def test_the_union_is_of_either_over_its_mean(monkeypatch):
    """Three chunk tokens and two of text: angles 0, 1, 2 (mean 1), attention 6, 0, 0 (mean 2)."""
    unused: Any = None
    layer = Layer(
        unused, 0, unused, unused, unused, unused, ids=jnp.array([0, 1, 2, 3, 4]),
        indices=jnp.arange(5), question=jnp.array([0, 0, 0, 1, 1], bool),
        chunks=jnp.array([[0, 3], [0, 0]]), old=unused, new=unused,
    )  # fmt: skip
    observing = []

    def columns(self, observers):
        observing.append(np.asarray(observers).tolist())
        return jnp.array([6.0, 0, 0, 9, 9])

    monkeypatch.setattr(Layer, "columns", columns)
    monkeypatch.setitem(vars(scores), "value_angle", lambda _: jnp.array([0.0, 1, 2, 7, 7]))
    found = scores.find_score("deviation_or_influence:1.5,2,1")(layer)
    np.testing.assert_allclose(found[:3], [1.5, 1 / 1.5, 2 / 1.5], rtol=1e-6)
    assert observing == [[False, False, False, False, True]]  # the last one only


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detect": 0}, "at least 1"),
        ({"detect": 4, "end": 3}, "at least 4"),
        ({"threshold": -1}, "at least 0"),
        ({"most": 2}, r"\[0, 1\]"),
        ({"start": 2, "detect": 2}, "at least 3"),
        ({"influence": -1}, "influence must be a number of at least 0"),
        ({"suffix": 0}, "at least 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RelayCaching(**options)
