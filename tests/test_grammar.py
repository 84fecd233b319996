"""Structured outputs: every text matches, nobody else is touched, the mask is what was asked."""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import LLM, GrammarFailed, SamplingParams, StructuredOutputs
from kvjax.decode import DecodeState, RowRequest, load_masks, pack_rows, process_logits
from kvjax.grammar import Grammars, mask_words
from tests.tiny_checkpoint import write_tiny_checkpoint
from tests.tiny_model import END, VOCAB, LetterTokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    model = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")
    return LLM(
        model, dtype="float32", max_num_seqs=4, max_num_batched_tokens=64, max_model_len=256,
        kv_cache_memory=2 << 20, deterministic=True,
    )  # fmt: skip


def params(seed: int = 0, **asked) -> SamplingParams:
    return SamplingParams(
        max_tokens=240, seed=seed, temperature=1.0, structured_outputs=StructuredOutputs(**asked)
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_random_model_writes_json_of_the_schema(llm, seed):
    (output,) = llm.generate("{", params(seed, json=json.dumps(SCHEMA)))
    (answer,) = output.outputs
    assert answer.finish_reason == "stop"
    value = json.loads(answer.text)
    assert set(value) == {"name", "age", "tags"}
    assert 0 <= value["age"] <= 99
    assert len(value["name"]) <= 6
    assert set(value["tags"]) <= {"a", "b"}


def test_regex_choice_and_grammar_are_matched_by_every_completion(llm):
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"regex": r"[a-f]{3}-[0-9]{2}"}, r"[a-f]{3}-[0-9]{2}"),
        ({"choice": ["yes", "no", 'perhaps "so"']}, r'yes|no|perhaps "so"'),
        ({"grammar": 'start: "(" start ")" | "x"'}, r"\(*x\)*"),
    )
    for asked, pattern in cases:
        one = SamplingParams(
            max_tokens=150, n=3, seed=1, temperature=1.0,
            structured_outputs=StructuredOutputs(**asked),
        )  # fmt: skip
        (output,) = llm.generate("say", one)
        for answer in output.outputs:
            assert answer.finish_reason == "stop", asked
            assert re.fullmatch(pattern, answer.text), answer.text


def test_batch_mates_without_a_grammar_keep_their_tokens(llm):
    free = SamplingParams(max_tokens=20, seed=3, temperature=1.0, ignore_eos=True)
    alone = [o.outputs[0].token_ids for o in llm.generate(["one", "two"], free)]
    strict = params(json=json.dumps(SCHEMA))
    together = llm.generate(["one", "{", "two", "{"], [free, strict, free, strict])
    assert [together[0].outputs[0].token_ids, together[2].outputs[0].token_ids] == alone
    assert together[1].outputs[0].token_ids == together[3].outputs[0].token_ids


def test_overlap_changes_nothing_about_a_grammar(llm):
    asked = params(5, regex="[a-z]{40}")
    texts = []
    for overlap in (True, False):
        object.__setattr__(llm.engine.config, "overlap", overlap)
        texts.append([o.outputs[0].text for o in llm.generate(["a", "b"], asked)])
    object.__setattr__(llm.engine.config, "overlap", True)
    assert texts[0] == texts[1]


def test_a_preempted_completion_goes_on_where_its_grammar_was(llm):
    asked = params(7, regex="[a-z]{60}")
    expected = llm.generate("some prompt", asked)[0].outputs[0].text
    request = llm._requests("some prompt", asked)[0]
    llm.engine.add(request)
    for step in range(1000):
        if not llm.engine.has_work:
            break
        llm.engine.step()
        running = llm.engine.scheduler.running
        if step % 7 == 3 and running:
            llm.engine.scheduler.preempt(running[0])
    assert request.metrics.num_preemptions > 3
    assert llm._intake.output(request).outputs[0].text == expected


def test_what_forbids_everything_that_is_allowed_fails_that_request_alone(llm):
    asked = StructuredOutputs(regex="a+")
    wrong = SamplingParams(max_tokens=5, structured_outputs=asked, allowed_token_ids=[70])
    bad, good = llm.generate(["x", "y"], [wrong, params(regex="b")])
    assert isinstance(bad.error, GrammarFailed)
    assert good.outputs[0].text == "b"


@pytest.mark.parametrize(
    "asked",
    [{"regex": "(("}, {"grammar": "no rule"}, {"json": '{"type": "nonsense"}'}, {"json": "{"}],
)
def test_a_grammar_that_cannot_be_is_refused_before_any_work(llm, asked):
    computed = llm.engine.runner.real_tokens
    with pytest.raises(ValueError):  # noqa: PT011 - llguidance's words differ
        llm.generate("x", params(**asked))
    assert llm.engine.runner.real_tokens == computed


@pytest.mark.parametrize(
    "asked", [{}, {"regex": "a", "choice": ["b"]}, {"choice": []}, {"json": ""}]
)
def test_structured_outputs_are_exactly_one_thing(asked):
    with pytest.raises(ValueError, match=r"exactly one|choice|json"):
        StructuredOutputs(**asked)


def test_nothing_is_compiled_for_a_grammar_after_warm_up(llm):
    llm.warm_up()
    before = llm.engine.runner.compiles
    llm.generate(["x", "y"], params(regex="[a-c]{3}"))
    assert llm.engine.runner.compiles == before


def test_a_mask_holds_the_tokens_of_which_the_grammar_has_a_beginning():
    matcher = Grammars(LetterTokenizer(), VOCAB, (END,)).matcher(StructuredOutputs(regex="[ab]c"))
    tokens = LetterTokenizer()

    def allowed() -> set[bytes]:
        bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
        return {tokens.token_bytes(int(t)) for t in np.flatnonzero(bits[:VOCAB])}

    assert {b"a", b"b"} <= allowed() <= {b"a", b"b", b"ac", b"bc"}
    assert matcher.accept(ord("a"))
    assert allowed() == {b"c"}
    assert not matcher.fresh().accept(ord("x"))
    assert matcher.accept(ord("c"))
    assert matcher.complete


def test_the_device_bans_exactly_what_the_mask_leaves_out():
    vocab, seats = 77, 3
    random = np.random.default_rng(0)
    masks = random.integers(-(2**31), 2**31, (2, mask_words(vocab))).astype(np.int32)
    logits = jnp.asarray(random.normal(size=(3, vocab)), jnp.float32)
    state = load_masks(DecodeState.allocate(seats, vocab), np.array([2, 0], np.int32), masks)
    plain = SamplingParams(temperature=0)
    rows = pack_rows(
        [RowRequest(seat, plain, seed=0, position=0, uses_grammar=seat != 1) for seat in range(3)],
        3,
        seats,
    )
    edited = np.asarray(jax.jit(process_logits)(logits, state, rows))
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, :vocab].astype(bool)
    np.testing.assert_array_equal(np.isfinite(edited[2]), bits[0])
    np.testing.assert_array_equal(np.isfinite(edited[0]), bits[1])
    np.testing.assert_array_equal(edited[1], logits[1])
    np.testing.assert_array_equal(edited[0][bits[1]], np.asarray(logits)[0][bits[1]])
