"""The default model in the forms the peers read: `python -m benchmarks.peers.weights GGUF DIR`.

All are made from the same GGUF, so every target computes with the same numbers: its tensors are
dequantised to float32 once and then stored as float32, float16, bfloat16, Q8_0, or as a Hugging
Face folder. Norms stay float32 in every GGUF. kvjax's own loader has no part in it.
"""

import argparse
import json
from pathlib import Path

import numpy as np

FORMATS = ("hf", "f32.gguf", "f16.gguf", "bf16.gguf", "q8_0.gguf")
_HF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def prepare(source: Path, folder: Path, name: str) -> Path:
    """The path of `source` in the form `name`, made under `folder` if it is not there yet.

    Args:
        source: a GGUF of the llama architecture.
        name: one of `FORMATS`, or "" for `source` itself.
    """
    if name == "":
        return source
    if name not in FORMATS:
        raise ValueError(f"expected one of {FORMATS}, got {name!r}")
    path = folder / name
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"partial-{name}"
    if name == "hf":
        _write_hugging_face(source, partial)
    else:
        _write_gguf(source, partial, name.removesuffix(".gguf"))
    partial.rename(path)
    return path


def unpermuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a q or k matrix from GGUF's interleaved rotary order to Hugging Face's halves.

    weight: [num_heads * head_dim, hidden].
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, hidden)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, hidden))


def _field(reader, key: str):
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the GGUF has no {key}")
    return field.contents()


def _dequantised(tensor) -> np.ndarray:
    from gguf.quants import dequantize

    return np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)


def _write_hugging_face(source: Path, folder: Path) -> None:
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    reader = GGUFReader(source)
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise ValueError(f"expected the llama architecture, got {architecture!r}")
    heads = _field(reader, "llama.attention.head_count")
    kv_heads = _field(reader, "llama.attention.head_count_kv")
    tensors = {}
    for tensor in reader.tensors:
        weight = _dequantised(tensor)
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            if parts[2] in ("attn_q", "attn_k"):
                weight = unpermuted(weight, heads if parts[2] == "attn_q" else kv_heads)
            name = f"model.layers.{parts[1]}.{_HF_NAMES[parts[2]]}.weight"
        else:
            name = {
                "token_embd": "model.embed_tokens.weight",
                "output_norm": "model.norm.weight",
                "output": "lm_head.weight",
            }[parts[0]]
        tensors[name] = weight
    theta = float(_field(reader, "llama.rope.freq_base"))
    hidden = _field(reader, "llama.embedding_length")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rms_norm_eps": float(_field(reader, "llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _write_gguf(source: Path, path: Path, kind: str) -> None:
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
    from gguf.quants import quantize

    kinds = {
        "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
        "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
        "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
        "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    }
    matrix_type, file_type = kinds[kind]
    reader = GGUFReader(source)
    writer = GGUFWriter(path, _field(reader, "general.architecture"))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        if field.name == "general.file_type":
            writer.add_file_type(file_type)
            continue
        is_array = field.types[0] == GGUFValueType.ARRAY
        item = field.types[-1] if is_array else None
        writer.add_key_value(field.name, field.contents(), field.types[0], item)
    for tensor in reader.tensors:
        weight = _dequantised(tensor)
        stored = matrix_type if weight.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, quantize(weight, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Makes every form."""
    parser = argparse.ArgumentParser(description="the weights in the forms the peers read")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    for name in FORMATS:
        print(prepare(args.gguf, args.folder, name))


if __name__ == "__main__":
    main()
