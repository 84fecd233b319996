"""What decoding wrote is reused where it is quoted: the KV, its lineage, its tenant, its stages."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import LLM, SamplingParams
from kvjax.cache.chunks import Variant, tokens_hash
from kvjax.request import Chunk, RequestOutput
from kvjax.reuse.plan import Spans, TopK
from kvjax.reuse.relaycaching import RelayCaching
from kvjax.reuse.scores import Layer, value_angle
from kvjax.reuse.strategy import Hit, ModelFacts, Prompt, Segment
from tests.tiny_model import END, tiny

FIRST, SYSTEM, QUESTION = "thequickbrownfox", "answerfrom", "whatisinthebox"
DOCUMENT = "packmyboxwithfivedozenliquorjugs"
GREEDY = SamplingParams(max_tokens=21, temperature=0, ignore_eos=True)
PARAMS = SamplingParams(max_tokens=4, temperature=0, logprobs=8)
RELAY = "relaycaching:detect=1"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny(LLM, fresh=True, num_pages=160, max_model_len=256)


def relay(llm: LLM, prompt: Any = FIRST, **options: Any) -> tuple[int, ...]:
    """Tokens of one output that is kept."""
    (out,) = llm.relay([prompt], dataclasses.replace(GREEDY, **options))
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
        run(llm, prompt, f"{RELAY},threshold={t},most={m}").reuse.groups[-1].recomputed
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


def test_stages_are_the_layer_range():
    prompt = Prompt(tuple(range(30)), (Segment(5, 25, "c"),), None, ModelFacts(12, 8, 1, 1), 2)
    hit = Hit(0, prompt.segments[0], Any, 5, 25)  # type: ignore[arg-type]
    plan = RelayCaching(detect=3, end=9, most=0.4).select(prompt, [hit])
    assert not isinstance(plan, Spans)
    assert [(s.l0, s.l1) for s in plan.stages] == [(0, 3), (3, 9), (9, 12)]
    assert plan.stages[0].rows == Spans(((2, 29),))
    assert plan.stages[1].rows == TopK("value_angle", 8, 1.5)
    assert plan.stages[2].rows == TopK("value_angle", 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detect": 0}, "at least 1"),
        ({"detect": 4, "end": 3}, "at least 4"),
        ({"threshold": -1}, "at least 0"),
        ({"most": 2}, r"\[0, 1\]"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RelayCaching(**options)
