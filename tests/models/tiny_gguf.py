"""Writes small GGUF files for tests."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, FFN, VOCAB, LAYERS = 32, 4, 2, 64, 48, 2

SIZES = {
    "block_count": LAYERS,
    "context_length": 512,
    "embedding_length": HIDDEN,
    "feed_forward_length": FFN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-6,
}


def layer_tensors(rng: np.random.Generator, layer: int) -> dict[str, np.ndarray]:
    """One layer of a plain llama, under the file's names."""
    head_dim = HIDDEN // HEADS
    shapes = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HEADS * head_dim, HIDDEN),
        "attn_k": (KV_HEADS * head_dim, HIDDEN),
        "attn_v": (KV_HEADS * head_dim, HIDDEN),
        "attn_output": (HIDDEN, HEADS * head_dim),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (FFN, HIDDEN),
        "ffn_up": (FFN, HIDDEN),
        "ffn_down": (HIDDEN, FFN),
    }
    return {
        f"blk.{layer}.{name}.weight": rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def llama_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """All of a plain llama with tied embeddings."""
    rng = np.random.default_rng(seed)
    tensors = {
        "token_embd.weight": rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32),
        "output_norm.weight": rng.normal(size=HIDDEN).astype(np.float32),
    }
    for layer in range(LAYERS):
        tensors |= layer_tensors(rng, layer)
    return tensors


def write_gguf(
    path: Path,
    architecture: str = "llama",
    tensors: dict[str, np.ndarray] | None = None,
    metadata: dict[str, Any] | None = None,
    quantisation: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """`metadata` keys without a dot are the architecture's or, with "tokenizer", as they stand."""
    writer = gguf.GGUFWriter(path, architecture)
    values = {f"{architecture}.{key}": value for key, value in SIZES.items()}
    for key, value in (metadata or {}).items():
        is_global = key.startswith(("tokenizer.", "general.", "split."))
        values[key if is_global else f"{architecture}.{key}"] = value
    for key, value in values.items():
        _add(writer, key, value)
    for name, tensor in (llama_tensors() if tensors is None else tensors).items():
        if quantisation is not None and tensor.ndim == 2:
            stored = gguf.quantize(tensor, quantisation)
            writer.add_tensor(name, stored, raw_dtype=quantisation)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
