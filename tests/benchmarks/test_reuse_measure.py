"""The instrument of `bench reuse` over a tiny engine: what it reads is what it says."""

import dataclasses

import numpy as np
import pytest

from kvjax import LLM, SamplingParams
from kvjax.benchmarks.corpora import Corpus, Item, Passage
from kvjax.benchmarks.reuse_measure import EngineInstrument, kv_deviation
from kvjax.errors import UnknownStrategy
from kvjax.readout import LayerKV
from kvjax.request import Chunk
from tests.tiny_model import CONFIG, tiny

ITEM = Item(
    id="one", corpus="c", template="t", system="s", question="which?", answers=("ab",),
    passages=(Passage("p1", "words of the first. "), Passage("p2", "and of the second. "),
              Passage("p3", "message", token_ids=(70, 71, 72, 73))),
)  # fmt: skip
OTHER = dataclasses.replace(ITEM, id="two", passages=ITEM.passages[::-1])
CORPUS = Corpus("c", (ITEM, OTHER), ())
BLEND = "cacheblend:ratio=0.3,check_layer=0"  # its check layer runs every row
HEAD = "epic:k=0,head=true"
METHODS = ["full", "prefix", "naive", HEAD, "epic:k=4", BLEND, "oracle:ratio=0.3"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny(LLM, fresh=True, num_pages=128, max_model_len=256)


@pytest.fixture(scope="module")
def readings(llm):
    instrument = EngineInstrument(llm, {"model": "tiny"})
    instrument.begin(CORPUS, METHODS)
    found = {method: instrument.measure(ITEM, method) for method in METHODS}
    llm.engine.check_integrity()
    return found


def timeless(reading):
    return dataclasses.replace(reading, prefill_s=0.0)


def test_full_prefill_is_at_no_distance_from_itself(readings):
    full = readings["full"]
    assert full.kl_1 == full.kl_answer == 0
    assert full.kv_deviation == (0.0,) * CONFIG.num_layers
    assert full.top1
    assert full.agreement == full.computed_share == 1
    assert (full.copied_tokens, full.stored_bytes_per_token) == (0, 0)


def test_a_cached_prefix_costs_less_and_changes_nothing(readings):
    prefix = readings["prefix"]
    assert prefix.kl_answer < 1e-6
    expected = 1 - len(ITEM.head) / (len(ITEM.head) + 20 + 19 + 4 + 1 + len(ITEM.tail))
    assert prefix.computed_share == pytest.approx(expected)


def test_naive_reuse_copies_every_passage_and_deviates_only_where_context_is_seen(readings):
    naive = readings["naive"]
    assert naive.copied_tokens == 20 + 19 + 4
    assert naive.stored_bytes_per_token == 2 * 4 * 2 * 64 * CONFIG.num_layers  # f32 K, V; 2 heads
    assert naive.kv_deviation[0] < 1e-9 < naive.kv_deviation[1]
    assert naive.kl_answer > 0


def test_what_encoding_leaves_in_the_prefix_cache_is_no_merit_of_a_method(readings):
    """Behind the head, the first passage is an ordinary prefix."""
    assert readings[HEAD].copied_tokens == readings["naive"].copied_tokens
    assert readings[HEAD].computed_share == readings["naive"].computed_share


def test_recomputing_tokens_costs_more_and_brings_kv_nearer_to_full_prefills(readings):
    naive = readings["naive"]
    for method in ("epic:k=4", BLEND, "oracle:ratio=0.3"):
        assert naive.computed_share < readings[method].computed_share < 1
        assert readings[method].kv_deviation[1] < naive.kv_deviation[1]


def test_a_reading_does_not_depend_on_what_was_measured_before(llm, readings):
    again = EngineInstrument(llm, {})
    again.begin(CORPUS, METHODS)
    again.measure(OTHER, "naive")
    for method in reversed(METHODS):
        assert timeless(again.measure(ITEM, method)) == timeless(readings[method])


def test_the_log_probability_of_the_gold_answer_is_the_prompts_own(llm, readings):
    gold = llm.get_tokenizer().encode(ITEM.answer)
    prompt = ITEM.prompt(lambda p: Chunk(p.text if p.token_ids is None else p.token_ids))
    with llm.open(prompt) as branch:
        ids = [*branch.token_ids, *gold]
    (out,) = llm.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=0))
    expected = sum(out.prompt_logprobs[-n][gold[-n]].logprob for n in (1, 2))
    assert readings["full"].gold_logprob == pytest.approx(expected, abs=1e-4)


def test_a_method_that_is_no_strategy_has_no_reading(llm):
    with pytest.raises(UnknownStrategy, match="no reuse strategy 'block_mask'"):
        EngineInstrument(llm, {}).measure(ITEM, "block_mask")


def test_generations_are_greedy_and_end_before_the_end_token(llm):
    (made,) = EngineInstrument(llm, {}).generate(["some text"], 6)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    (out,) = llm.generate(["some text"], params)
    expected = out.outputs[0].token_ids
    end = expected.index(0) if 0 in expected else 6
    assert made.token_ids == expected[:end]


def test_kv_deviation_is_the_squared_distance_over_the_squares():
    full = LayerKV(np.array([[[3.0, 0.0]], [[0.0, 2.0]]]), np.array([[[0.0, 4.0]], [[0.0, 0.0]]]))
    assert full.v is not None
    more_k, more_v = np.array([[[1.0, 0.0]], [[0.0, 0.0]]]), np.array([[[0.0, 2.0]], [[1.0, 1.0]]])
    other = LayerKV(full.k + more_k, full.v + more_v)
    assert kv_deviation(full, other).tolist() == [5 / 25, 2 / 4]
    latent = LayerKV(full.k, None)
    assert kv_deviation(latent, LayerKV(other.k, None)).tolist() == [1 / 9, 0]
