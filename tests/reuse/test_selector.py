"""A second model as CacheClip's selector: what it scores, keeps, and refuses to read."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import LLM
from kvjax.cache.pages import KVPages
from kvjax.models import kv_spec, load_model, model_config
from kvjax.models.checkpoint import open_checkpoint
from kvjax.readout import row_views
from kvjax.request import Chunk
from kvjax.reuse import CacheClip, parse
from kvjax.reuse.report import Fate
from kvjax.reuse.retokenised import carried, edges
from kvjax.reuse.selector import Selector, load_selector
from kvjax.reuse.windows import group_windows
from tests.reuse.prompts import (
    FIRST,
    QUESTION,
    SECOND,
    SYSTEM,
    THIRD,
    answer,
    distance,
    fresh_llm,
    full_prefill,
    last_rows,
)
from tests.tiny_checkpoint import write_tiny_checkpoint

PROMPT = [SYSTEM, Chunk(FIRST), Chunk(SECOND), Chunk(THIRD), QUESTION]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("small") / "model", seed=3)


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    model = write_tiny_checkpoint(tmp_path_factory.mktemp("large") / "model")
    return LLM(
        model, dtype="float32", deterministic=True, force_reuse=True, max_model_len=256,
        max_num_seqs=2, max_num_batched_tokens=32, seed=0,
    )  # fmt: skip


def selector_of(folder: Path, context: int = 256) -> Selector:
    checkpoint = open_checkpoint(folder)
    config = model_config(checkpoint.config)
    model = load_model(config, checkpoint.tensors, dtype="float32", num_positions=context)
    return Selector(model, context, dtype="float32")


def by_hand(folder: Path, chunk, question) -> np.ndarray:
    """The same in one forward over both, with plain softmax."""
    checkpoint = open_checkpoint(folder)
    config = model_config(checkpoint.config)
    model = load_model(config, checkpoint.tensors, dtype="float32", num_positions=256)
    spec = kv_spec(config, "float32", 16)
    ids = jnp.array([*chunk, *question], jnp.int32)
    zero, count = jnp.int32(0), jnp.int32(len(ids))
    index, starts, views = row_views(spec, len(ids), zero, count, jnp.arange(16)[None], write=True)
    last = config.num_layers - 1
    pages = KVPages.allocate(spec, 16)
    hidden, _, _ = model.layers(model.embed(ids), pages, index, starts, views, l1=last)
    q, k = (np.asarray(x, np.float64) for x in model.project(last, hidden, index)[:2])
    q = q[len(chunk) :].reshape(len(question), config.num_kv_heads, -1, config.head_dim)
    logits = np.einsum("tgnd,sgd->tgns", q, k[: len(chunk)]) * config.scale
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).mean((0, 1, 2))


def test_scores_are_the_last_layers_attention_within_the_chunk(small):
    selector = selector_of(small)
    chunk, question = list(range(30, 105)), [7, 90, 3]
    scores = selector.scores([chunk], question)[0]
    assert scores.sum() == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(scores, by_hand(small, chunk, question), atol=1e-5)
    other = selector.scores([chunk], [100, 8])[0]
    np.testing.assert_allclose(other, by_hand(small, chunk, [100, 8]), atol=1e-5)
    np.testing.assert_array_equal(selector.scores([chunk], question)[0], scores)
    assert selector.num_encoded == 1  # questions leave the chunk's KV as it is


def test_a_chunk_longer_than_the_context_is_scored_in_pieces(small):
    selector = selector_of(small, context=64)
    scores = selector.scores([list(range(100))], list(range(40)))[0]
    assert scores.shape == (100,)
    assert scores.sum() == pytest.approx(-(-100 // 32), abs=1e-3)


def test_a_question_over_several_chunks_at_once_scores_each_as_alone(small):
    """Of different lengths, one of them twice, and more than one batch of them."""
    selector, question = selector_of(small), [7, 90, 3]
    chunks = [list(range(n, n + 20 + 30 * (n % 3))) for n in range(18)]
    chunks.append(chunks[4])
    together = selector.scores(chunks, question)
    assert selector.num_encoded == 18
    for number in (0, 17, 18):
        alone = by_hand(small, chunks[number], question)
        np.testing.assert_allclose(together[number], alone, atol=1e-5)
    assert all(scores.sum() == pytest.approx(1, abs=1e-4) for scores in together)
    selector._pool.check_integrity()


def test_chunks_leave_when_there_is_no_room_and_come_back_the_same(small, monkeypatch):
    monkeypatch.setattr("kvjax.reuse.selector.CAPACITY", 256)  # four pages
    selector = selector_of(small)
    chunks = [list(range(n, n + 70)) for n in range(3)]
    first = [selector.scores([chunk], [5, 6])[0] for chunk in chunks]
    assert selector.num_encoded == 3
    again = [selector.scores([chunk], [5, 6])[0] for chunk in chunks]
    assert selector.num_encoded > 3
    np.testing.assert_array_equal(first, again)
    selector._pool.check_integrity()


def run(llm: LLM, spec: str):
    llm.reset_prefix_cache()
    return answer(llm, PROMPT, spec)


def test_what_runs_again_is_windows_around_what_the_second_model_chose(llm, small):
    spec = f"cacheclip:selector={small},ratio=0.3,window=4,least=2"
    report = run(llm, spec).reuse
    again = set(last_rows(report, Fate.RECOMPUTED))
    at, scored = len(SYSTEM + FIRST), []  # the first chunk is exact
    for text in (SECOND, THIRD):
        ids = [llm.get_tokenizer().encode(t) for t in (text, QUESTION)]
        rows = range(at, at + len(text))
        scored += list(zip(load_selector(str(small)).scores(ids[:1], ids[1])[0], rows, strict=True))
        at += len(text)
    k = int(0.3 * len(SECOND + THIRD))
    chosen = {row for _, row in sorted(scored, key=lambda pair: (-pair[0], pair[1]))[:k]}
    wanted = set()
    for start in range(len(SYSTEM + FIRST), at):
        window = set(range(start, start + 4))
        wanted |= window if len(window & chosen) >= 2 else set()
    assert again == {row for row in wanted if row < at}
    assert 0 < len(again) < len(SECOND + THIRD)
    assert run(llm, "cacheclip:ratio=0.3,window=4,least=2").reuse.recomputed > 0


def test_windows_over_everything_are_full_prefill(llm, small):
    wanted = full_prefill(llm, PROMPT)
    assert distance(run(llm, f"cacheclip:selector={small},ratio=1"), wanted) <= 1e-4
    nearly = run(llm, f"cacheclip:selector={small},ratio=0.99,least=1")
    assert nearly.reuse.shifted == 0
    assert distance(nearly, wanted) <= 1e-4


def test_an_exact_prefix_and_chosen_windows_compose(llm, small):
    spec = f"cacheclip:selector={small},ratio=0.99,least=1"
    wanted = full_prefill(llm, PROMPT)
    run(llm, spec)
    llm.reset_prefix_cache()
    answer(llm, SYSTEM + FIRST + SECOND[:5])
    out = answer(llm, PROMPT, spec)
    assert out.reuse.exact >= len(SYSTEM + FIRST) + 4
    assert distance(out, wanted) <= 1e-4


def test_the_selector_is_loaded_once_and_only_when_something_is_chosen(llm, small):
    load_selector.cache_clear()
    run(llm, f"cacheclip:selector={small},ratio=0")
    assert load_selector.cache_info().currsize == 0
    for ratio in (0.2, 0.4):
        run(llm, f"cacheclip:selector={small},ratio={ratio}")
    assert load_selector.cache_info().misses == 1


def test_a_selector_of_another_tokenizer_reads_the_same_text(llm, small, tmp_path):
    """Here two letters have changed their ids: what it chooses is what it would with ours."""
    other = write_tiny_checkpoint(tmp_path / "model", seed=3)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    spec = f"cacheclip:selector={other},ratio=0.3,least=2"
    chosen = np.flatnonzero((run(llm, spec).reuse.fates == Fate.RECOMPUTED).all(axis=0))
    swapped = {ids["a"]: ids["b"], ids["b"]: ids["a"]}
    texts = [SECOND, THIRD]  # the first chunk is exact
    read = [[swapped.get(i, i) for i in llm.get_tokenizer().encode(text)] for text in texts]
    question = [swapped.get(i, i) for i in llm.get_tokenizer().encode(QUESTION)]
    scores = np.concatenate(selector_of(small).scores(read, question))
    best = np.zeros(len(scores), bool)
    best[np.argsort(-scores, kind="stable")[: int(0.3 * len(scores))]] = True
    wanted = np.flatnonzero(group_windows(jnp.array(best), 8, 2)) + len(SYSTEM + FIRST)
    assert len(np.intersect1d(chosen, wanted)) >= 0.8 * len(wanted)  # its weights are bfloat16


def test_a_selector_of_a_larger_vocabulary_serves_and_one_that_is_not_there_is_refused(llm, small):
    out = answer(fresh_llm(), PROMPT, f"cacheclip:selector={small},ratio=0.3,least=1")
    assert out.reuse.recomputed > 0
    with pytest.raises(FileNotFoundError, match="no model 'no such'"):
        answer(llm, PROMPT, "cacheclip:selector=no such")


@dataclasses.dataclass
class Words:
    """A vocabulary of the given strings."""

    words: list[bytes]

    def token_bytes(self, token_id: int) -> bytes:
        return self.words[token_id]


@pytest.mark.parametrize(
    ("theirs", "scores", "ours", "wanted"),
    [
        ([b"ab", b"cd"], [1, 2], [b"a", b"b", b"c", b"d"], [1, 1, 2, 2]),
        ([b"a", b"b", b"c", b"d"], [1, 5, 2, 3], [b"ab", b"cd"], [5, 3]),
        ([b"abc", b"d"], [1, 2], [b"ab", b"cd"], [1, 2]),
        ([b"ab"], [3], [b"a", b"", b"b"], [3, 0, 3]),
        ([b"\xe2\x82", b"\xac"], [4, 1], [b"\xe2", b"\x82\xac"], [4, 4]),
    ],
)
def test_a_token_scores_what_the_best_of_those_does_that_share_a_byte(theirs, scores, ours, wanted):
    places = [edges(range(len(words)), Words(words)) for words in (theirs, ours)]  # type: ignore[arg-type]
    np.testing.assert_array_equal(carried(np.array(scores), *places), wanted)


def test_a_text_with_a_byte_more_is_stretched():
    theirs, ours = np.array([0, 5, 9]), np.array([0, 4, 8])
    np.testing.assert_array_equal(carried(np.array([1, 2]), theirs, ours), [1, 2])


def test_options_are_validated():
    assert parse("cacheclip:selector=smollm2-135m") == CacheClip(selector="smollm2-135m")
    with pytest.raises(ValueError, match="selects with its last layer"):
        CacheClip(selector="a", selector_layers=3)
