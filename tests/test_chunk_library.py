"""Documents put, pinned, listed, deleted, saved and loaded: what comes back is what was there."""

import asyncio
import dataclasses
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from kvjax import LLM, AsyncLLM, Chunk, SamplingParams
from kvjax.cache.chunk_file import ChunkFile, Entry, write
from kvjax.errors import CorruptChunks, ForeignChunks, PromptTooLong, UnknownChunk
from kvjax.reuse import STRATEGIES, Naive
from kvjax.reuse.strategy import KVPatch
from tests.tiny_checkpoint import write_tiny_checkpoint
from tests.tiny_model import tiny

A, B, C = "the keeper is Farid, ", "his code is 4817; ", "prices are in crowns. "
PROMPT = ["You are terse. ", Chunk(B), Chunk(A), "what is the code?"]
GREEDY = SamplingParams(temperature=0, max_tokens=4, logprobs=5, ignore_eos=True, reuse="naive")
KV_DTYPES = ("float32", "bfloat16", "int8")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def opened(checkpoint: Path, **settings: Any) -> LLM:
    small: dict[str, Any] = {
        "dtype": "float32", "max_model_len": 256, "max_num_seqs": 2, "max_num_batched_tokens": 32,
        "page_size": 16, "kv_cache_memory": 2**20, "force_reuse": True, "seed": 0,
    }  # fmt: skip
    return LLM(checkpoint, **small | settings)


def contents(llm: LLM) -> dict[Any, Any]:
    """The stored KV by key, every bit of it."""
    size, found = llm.engine.spec.page_size, {}
    for variant in llm.engine.chunks.store:
        spans = llm.engine.runner.export(variant.slots(0, variant.num_tokens, size))
        arrays = [array for span in spans for array in span if array is not None]
        found[variant.key] = [(a.dtype, a.shape, a.tobytes()) for a in arrays]
    return found


def answer(llm: LLM) -> Any:
    llm.reset_prefix_cache()
    (out,) = llm.generate([PROMPT], GREEDY)
    assert out.error is None
    (completion,) = out.outputs
    assert completion.logprobs is not None
    logprobs = [{i: one.logprob for i, one in entry.items()} for entry in completion.logprobs]
    return completion.token_ids, logprobs, out.reuse.shifted


@pytest.mark.parametrize("kv_cache_dtype", KV_DTYPES)
def test_loaded_kv_is_the_saved_kv_to_the_bit_in_pages_of_another_size(
    checkpoint, tmp_path, kv_cache_dtype
):
    first = opened(checkpoint, kv_cache_dtype=kv_cache_dtype)
    assert all(put.stored for put in first.chunks.put([A, B, C * 9]))
    assert first.chunks.save(tmp_path / "chunks") == 3
    other = opened(checkpoint, kv_cache_dtype=kv_cache_dtype, page_size=64)
    assert other.chunks.load(tmp_path / "chunks") == (3, 0, 0, 0, 0)
    assert contents(other) == contents(first)
    assert other.chunks.load(tmp_path / "chunks") == (0, 3, 0, 0, 0)
    other.engine.check_integrity()


@pytest.fixture(scope="module")
def saved(checkpoint, tmp_path_factory) -> tuple[LLM, Path, Any]:
    """An engine, the file of its chunks, and what it answers by them."""
    llm, path = opened(checkpoint), tmp_path_factory.mktemp("saved") / "chunks"
    llm.chunks.put([A, B])
    llm.chunks.save(path)
    return llm, path, answer(llm)


def test_a_prompt_is_answered_from_loaded_chunks_as_it_was_before(saved, checkpoint):
    _, path, before = saved
    other = opened(checkpoint)
    assert other.chunks.load(path).loaded == 2
    assert answer(other) == before
    assert other.chunks.stats.admitted == 2  # by the load: nothing was encoded again
    assert before[2] == len(A) + len(B)


def test_a_damaged_chunk_is_dropped_with_a_warning_and_encoded_anew(
    saved, checkpoint, tmp_path, caplog, monkeypatch
):
    _, path, before = saved
    data = bytearray(path.read_bytes())
    data[-200] ^= 4  # in the KV of the last chunk: behind it are three checksums of 16 bytes
    (tmp_path / "damaged").write_bytes(data)
    llm = opened(checkpoint)
    monkeypatch.setattr(logging.getLogger("kvjax"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert llm.chunks.load(tmp_path / "damaged") == (1, 0, 0, 1, 0)
    assert "saved chunk 2 of 2" in caplog.text
    assert len(llm.chunks.list()) == 1
    assert answer(llm) == before
    assert len(llm.chunks.list()) == 2


def test_a_damaged_header_is_a_typed_error_and_loads_nothing(saved, checkpoint, tmp_path):
    llm, path, _ = saved
    before = contents(llm)
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    with pytest.raises(CorruptChunks, match="damaged"):
        llm.chunks.load(tmp_path / "damaged")
    assert contents(llm) == before


def test_chunks_of_another_model_or_kv_type_are_refused_by_name(saved, checkpoint, tmp_path):
    _, path, _ = saved
    stranger = opened(write_tiny_checkpoint(tmp_path / "other", seed=1))
    with pytest.raises(ForeignChunks, match=r"saved for another model: '\w+'; here it is '\w+'"):
        stranger.chunks.load(path)
    quantised = opened(checkpoint, kv_cache_dtype="int8")
    with pytest.raises(ForeignChunks, match="another kv dtype: 'float32'; here it is 'int8'"):
        quantised.chunks.load(path)
    assert not stranger.chunks.list()
    assert not quantised.chunks.list()


def test_what_strategies_keep_with_a_chunk_travels_with_it(checkpoint, tmp_path):
    first = opened(checkpoint)
    first.chunks.put([A], cache_salt="tenant")
    (variant,) = first.engine.chunks.store
    draw = np.random.default_rng(0)
    left = draw.standard_normal((2, len(A), 3), np.float32)
    right = draw.standard_normal((2, 3, 2, 8), np.float32)
    variant.scores["attention"] = draw.standard_normal(len(A), np.float32)
    variant.facts |= {"made": (10, "tfidf", None), "saving": 0.5, "nested": [{"x": True}]}
    variant.facts["patch"] = KVPatch(right, right * 2, left, left)
    variant.arrays["hidden"] = draw.standard_normal((2, 5)).astype(np.float16)
    variant.tail, variant.lineage, variant.context_ids = (), "blend", (1, 2)
    variant.uses, variant.pins, variant.context_chunks = 7, 2, ("one", "two")
    first.chunks.save(tmp_path / "chunks")
    other = opened(checkpoint)
    other.chunks.load(tmp_path / "chunks", ["tenant"])
    (found,) = other.engine.chunks.store
    for name in (
        "key", "base", "lineage", "context_ids", "context_chunks", "tail", "uses", "pins",
    ):  # fmt: skip
        assert getattr(found, name) == getattr(variant, name), name
    assert {k: v for k, v in found.facts.items() if k != "patch"} == {
        k: v for k, v in variant.facts.items() if k != "patch"
    }
    patch = found.facts["patch"]
    assert patch.v_left is patch.k_left  # the file has the shared factor once
    for name in ("k", "v", "k_left", "frame"):
        np.testing.assert_array_equal(
            getattr(patch, name), getattr(variant.facts["patch"], name), strict=name != "frame"
        )
    np.testing.assert_array_equal(found.scores["attention"], variant.scores["attention"])
    np.testing.assert_array_equal(found.arrays["hidden"], variant.arrays["hidden"], strict=True)


def test_a_file_has_no_salt_and_opens_to_those_who_name_it(checkpoint, tmp_path):
    secret, path = "tenant-7f3a", tmp_path / "chunks"
    first = opened(checkpoint)
    first.chunks.put([A], cache_salt=secret)
    first.chunks.put([B], cache_salt="another")
    first.chunks.put([C])
    first.chunks.save(path)
    assert secret.encode() not in path.read_bytes()
    stranger = opened(checkpoint)
    assert stranger.chunks.load(path) == (1, 0, 0, 0, 2)  # what nobody owns, and two are locked
    assert stranger.chunks.load(path, ["guess"]) == (0, 1, 0, 0, 2)
    assert {v.key.salt for v in stranger.engine.chunks.store} == {None}
    assert stranger.chunks.load(path, [secret]) == (1, 1, 0, 0, 1)
    (info,) = stranger.chunks.list(secret)
    assert info.token_ids == tuple(first.chunks.list(secret)[0].token_ids)
    first.chunks.save(path)
    again = path.read_bytes()
    first.chunks.save(path)
    assert again != path.read_bytes()  # of two files nobody can tell that a tenant is the same


def test_variants_of_strategies_serve_from_a_file_as_they_did_before(checkpoint, tmp_path):
    """What Cache-Craft keeps of real prompts, what TableCache keeps behind other chunks, hidden
    states without any pages."""
    path = tmp_path / "chunks"
    first = opened(checkpoint, kv_cache_memory=2**22)
    craft = "cachecraft:ratio=0.3,focus=1"
    texts = ["CREATE TABLE p (a INT);", "CREATE TABLE c (b INT REFERENCES p (a));"]
    first.chunks.put(texts, strategy="tablecache")
    first.chunks.put([C], strategy="hcache")
    prompts = {craft: PROMPT, "tablecache": ["x ", *map(Chunk, texts), "?"], "hcache": [Chunk(C)]}

    def answers(llm: LLM, spec: str) -> Any:
        llm.reset_prefix_cache()
        params = dataclasses.replace(GREEDY, reuse=spec, extra_args={"learn": False})
        (out,) = llm.generate([prompts[spec]], params)
        assert out.error is None
        return out.outputs[0].token_ids, out.reuse.fates.tolist()

    first.generate([PROMPT], dataclasses.replace(GREEDY, reuse=craft))  # which it learns from
    first.generate([["x ", Chunk(A), Chunk(B), "?"]], dataclasses.replace(GREEDY, reuse=craft))
    wanted = {spec: answers(first, spec) for spec in prompts}
    assert any("cachecraft" in v.facts and v.context_ids for v in first.engine.chunks.store)
    count = first.chunks.save(path)
    other = opened(checkpoint, kv_cache_memory=2**22)
    assert other.chunks.load(path).loaded == count
    admitted = other.chunks.stats.admitted
    assert {spec: answers(other, spec) for spec in prompts} == wanted
    assert other.chunks.stats.admitted == admitted  # nothing had to be encoded again
    other.engine.check_integrity()


class Age(NamedTuple):
    order: int
    uses: int


@dataclasses.dataclass(frozen=True)
class Remembering(Naive):
    name = "remembering"


def test_records_of_strategies_travel_and_those_of_strangers_are_refused(
    checkpoint, tmp_path, monkeypatch
):
    llm = opened(checkpoint)
    llm.chunks.put([A])
    (variant,) = llm.engine.chunks.store
    variant.facts["ages"] = {"pool": Age(3, 4)}
    with pytest.raises(ValueError, match="keeps a Age, which cannot be saved"):
        llm.chunks.save(tmp_path / "chunks")
    monkeypatch.setitem(STRATEGIES, "remembering", Remembering)
    llm.chunks.save(tmp_path / "chunks")
    llm.chunks.delete(Chunk(A))
    llm.chunks.load(tmp_path / "chunks")
    (found,) = llm.engine.chunks.store
    assert found.facts["ages"]["pool"]._replace(uses=5) == Age(3, 5)
    llm.chunks.delete(Chunk(A))
    monkeypatch.delitem(STRATEGIES, "remembering")
    with pytest.raises(
        ForeignChunks, match=r"test_chunk_library\.Age, which no strategy here knows"
    ):
        llm.chunks.load(tmp_path / "chunks")
    assert not llm.chunks.list()


def test_kv_of_another_shape_under_right_checksums_is_refused(checkpoint, tmp_path):
    llm = opened(checkpoint)
    llm.chunks.put([A])
    llm.chunks.save(tmp_path / "chunks")
    with ChunkFile(tmp_path / "chunks") as file:
        arrays, (fields,), about = file.read(0), file.entries, file.about
    assert arrays is not None
    arrays["k0"] = arrays["k0"][:, :, :1]
    shapes = {key: (array.dtype, array.shape) for key, array in arrays.items()}
    write(tmp_path / "chunks", about, [Entry(fields, shapes, lambda: arrays)])
    llm.chunks.delete(Chunk(A))
    with pytest.raises(CorruptChunks, match=r"chunk 1: .*k0 is float32"):
        llm.chunks.load(tmp_path / "chunks")
    assert not llm.chunks.list()


def test_what_cannot_be_saved_is_named(checkpoint, tmp_path):
    llm = opened(checkpoint)
    llm.chunks.put([A])
    (variant,) = llm.engine.chunks.store
    variant.facts["odd"] = object()
    with pytest.raises(ValueError, match="keeps a object, which cannot be saved"):
        llm.chunks.save(tmp_path / "chunks")
    assert not list(tmp_path.iterdir())


def test_a_file_is_let_in_up_to_the_stores_capacity_pinned_and_last_used_first(
    checkpoint, tmp_path
):
    first = opened(checkpoint)
    puts = first.chunks.put([A * 2, B * 2, C * 2])
    first.chunks.pin(Chunk(A * 2))
    first.chunks.save(tmp_path / "chunks")
    small = opened(checkpoint)
    small.engine.chunks.store.capacity_pages = 6  # two of three pages each
    assert small.chunks.load(tmp_path / "chunks") == (2, 0, 1, 0, 0)
    found = {info.id: info.pinned for info in small.chunks.list()}
    assert found == {puts[0].id: True, puts[2].id: False}
    assert small.chunks.stats.pages <= 6
    small.engine.check_integrity()


# ---- the rest of the library --------------------------------------------------------------------


@pytest.fixture
def llm() -> LLM:
    return tiny(LLM, fresh=True, num_pages=32, max_model_len=256)


def test_put_says_what_is_stored_and_list_shows_it(llm, capsys):
    puts = llm.chunks.put([A, Chunk(tuple(map(ord, B))), A], progress=True)
    assert [(put.num_tokens, put.stored) for put in puts] == [
        (len(A), True), (len(B), True), (len(A), True)
    ]  # fmt: skip
    assert "chunks" in capsys.readouterr().err
    assert puts[0] == puts[2]
    listed = llm.chunks.list()
    assert [info.id for info in listed] == [puts[0].id, puts[1].id]
    assert listed[0].token_ids == tuple(map(ord, A))
    assert (listed[0].variants, listed[0].lineages, listed[0].pinned) == (1, ("exact",), False)
    assert llm.chunks.list("tenant") == ()
    k, v = llm.chunks.read(puts[0].id)
    assert k.shape[1] == v.shape[1] == len(A)


def test_no_document_is_encoded_if_one_of_them_is_wrong(llm):
    with pytest.raises(PromptTooLong, match="260 tokens"):
        llm.chunks.put([A, "x" * 260])
    with pytest.raises(ValueError, match="token id 999"):
        llm.chunks.put([A, Chunk((999,))])
    with pytest.raises(ValueError, match="must not be empty"):
        llm.chunks.put([A, ""])
    assert not llm.engine.has_work
    assert not llm.chunks.list()


def test_a_deleted_chunk_is_gone_even_if_it_was_pinned(llm):
    (put,) = llm.chunks.put(A)
    assert llm.chunks.pin(put.id) == 1
    assert llm.chunks.delete(Chunk(A)) == 1
    for call in (llm.chunks.delete, llm.chunks.pin, llm.chunks.unpin, llm.chunks.read):
        with pytest.raises(UnknownChunk, match=put.id):
            call(put.id)
    llm.engine.check_integrity()


async def _served(llm: AsyncLLM) -> None:
    puts = await llm.chunks.put([A, B], cache_salt="tenant")
    assert all(put.stored for put in puts)
    assert await llm.chunks.pin(puts[0].id, "tenant") == 1
    assert await llm.chunks.unpin(puts[0].id, "tenant") == 1
    assert {info.id for info in await llm.chunks.list("tenant")} == {put.id for put in puts}
    assert await llm.chunks.delete(puts[0].id, "tenant") == 1
    with pytest.raises(UnknownChunk):
        await llm.chunks.pin(puts[0].id)
    assert (await llm.chunks.stats()).chunks == 1


def test_a_server_puts_lists_pins_and_deletes_beside_its_steps():
    llm = tiny(AsyncLLM, fresh=True, num_pages=32, max_model_len=256)
    try:
        asyncio.run(_served(llm))
    finally:
        llm.shutdown()
