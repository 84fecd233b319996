"""Writes a tiny random model with a byte tokenizer and a chat template: loads in a blink."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from kvjax.models import model_config, random_tensors

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
CHAT = (
    "{% for t in tools or [] %}<|system|><tool_call>{{ t.function.name }}<|end|>{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token per byte, then the special ones."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return inner


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A `config.json` of two layers."""
    return {
        "model_type": "llama",
        "vocab_size": 256 + len(SPECIAL),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "eos_token_id": 256,
    } | changes


def write_tiny_checkpoint(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder; `changes` are to the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(**changes)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = model_config(config)
    tensors = {name: np.asarray(t) for name, t in random_tensors(shapes, seed).items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"eos_token": SPECIAL[0], "bos_token": None, "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
