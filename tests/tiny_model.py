"""A random two-layer model, a tokenizer of single letters, and small engines over them."""

import functools
import sys
from collections.abc import Iterable
from typing import Any
from unittest import mock

from kvjax.build import Built, enable_compilation_cache
from kvjax.config import EngineConfig
from kvjax.engine import Engine
from kvjax.intake import Intake
from kvjax.models import ModelConfig, Transformer, kv_spec, load_model, random_tensors
from kvjax.models.config import RopeConfig
from kvjax.models.tokenizers import decoding

VOCAB, END = 256, 0


class LetterTokenizer:
    """ASCII letters are their own ids; ids from 128 on are two letters each; 0 is the end."""

    vocab_size = VOCAB
    bos_token_id = None
    eos_token_ids = (END,)
    special_ids = frozenset({END})
    chat_template = None
    fingerprint = "letters"
    strips_leading_space = False

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [min(ord(letter), 127) for letter in text]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return decoding.decode(self, ids, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id == END:
            return b"<end>"
        if token_id < 128:
            return bytes([token_id])
        return b"etaoinshrdlu"[token_id % 12 : token_id % 12 + 1] + bytes([97 + token_id % 26])

    def token_to_id(self, token: str) -> int | None:
        return ord(token) if len(token) == 1 else None

    def id_to_token(self, token_id: int) -> str | None:
        return self.token_bytes(token_id).decode()


CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position=256,
    norm_eps=1e-5,
    rope=RopeConfig(rotary_dim=64),
    eos_token_ids=(END,),
)


@functools.cache
def tiny_model(dtype: Any = "float32", deterministic: bool = True) -> Transformer:
    return load_model(
        CONFIG,
        random_tensors(CONFIG, seed=1),
        dtype=dtype,
        num_positions=256,
        deterministic=deterministic,
    )


def tiny_engine(
    dtype: Any = "float32",
    *,
    num_pages: int = 64,
    max_model_len: int = 128,
    layout: Any = "split",
    cascade: bool | None = None,
    **settings: Any,
) -> tuple[Engine, Intake]:
    """An engine of small limits: few programs, each compiled in about a second."""
    enable_compilation_cache()  # jax's keys hold the program, its flags and the versions
    settings = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "deterministic": True,
        "seed": 0,
        **settings,
    }
    config = EngineConfig(dtype=dtype, page_size=16, max_model_len=max_model_len, **settings)
    tokenizer = LetterTokenizer()
    engine = Engine(
        tiny_model(dtype, config.deterministic),
        kv_spec(CONFIG, config.kv_dtype, 16, layout),
        num_pages,
        config,
        max_model_len,
        decode_token=lambda token: tokenizer.decode([token], skip_special_tokens=False),
        cascade=cascade,
    )
    intake = Intake(
        tokenizer,
        vocab_size=VOCAB,
        end_token_ids=(END,),
        max_model_len=max_model_len,
        max_prompt_tokens=num_pages * 16,
        seed=config.seed,
        clock=engine.clock,
    )
    return engine, intake


def tiny(kind: Any, dtype: Any = "float32", *, fresh: bool = False, **settings: Any) -> Any:
    """An `LLM` or `AsyncLLM` (`kind`) over a tiny engine, which is shared unless `fresh`."""
    engine, intake = tiny_engine(dtype, **settings) if fresh else shared_engine(dtype, **settings)
    built = Built(engine, intake, None, CONFIG, intake.tokenizer)  # type: ignore[arg-type]
    with mock.patch.object(sys.modules[kind.__module__], "build", return_value=built):
        return kind("tiny", seed=0)


@functools.cache
def shared_engine(dtype: Any = "float32", **settings: Any) -> tuple[Engine, Intake]:
    """One engine for all tests that leave it as they found it."""
    return tiny_engine(dtype, **settings)
