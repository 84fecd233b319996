"""GGUF files: values, names and config as Hugging Face has them, and what is told at open."""

import contextlib
import hashlib
import math

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvjax.errors import CorruptWeights, KVJaxError, UnsupportedModel
from kvjax.models.checkpoint import open_checkpoint
from kvjax.models.checkpoint.gguf import GGUFCheckpoint
from tests.models.tiny_gguf import (
    FFN,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    VOCAB,
    layer_tensors,
    llama_tensors,
    write_gguf,
)

Q = gguf.GGMLQuantizationType
HEAD_DIM = HIDDEN // HEADS


def to_stored_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's rows of q or k -> those of a file: row 2i is channel i, and row 2i + 1 the
    channel that it rotates with, i + d/2."""
    head_dim = len(weight) // heads
    order = [
        head * head_dim + i + half * head_dim // 2
        for head in range(heads)
        for i in range(head_dim // 2)
        for half in range(2)
    ]
    return weight[order]


def test_a_llama_gets_its_names_and_its_rotary_order_back(tmp_path):
    tensors = llama_tensors()
    stored = dict(tensors)
    for layer in range(LAYERS):
        for name, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
            key = f"blk.{layer}.{name}.weight"
            stored[key] = to_stored_order(tensors[key], heads)
            stored[f"blk.{layer}.{name}.bias"] = to_stored_order(tensors[key][:, 0], heads)
    opened = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors=stored))
    layer = "model.layers.1."
    expected = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        layer + "input_layernorm.weight": "blk.1.attn_norm.weight",
        layer + "self_attn.q_proj.weight": "blk.1.attn_q.weight",
        layer + "self_attn.k_proj.weight": "blk.1.attn_k.weight",
        layer + "self_attn.v_proj.weight": "blk.1.attn_v.weight",
        layer + "self_attn.o_proj.weight": "blk.1.attn_output.weight",
        layer + "post_attention_layernorm.weight": "blk.1.ffn_norm.weight",
        layer + "mlp.gate_proj.weight": "blk.1.ffn_gate.weight",
        layer + "mlp.up_proj.weight": "blk.1.ffn_up.weight",
        layer + "mlp.down_proj.weight": "blk.1.ffn_down.weight",
    }
    for name, original in expected.items():
        np.testing.assert_array_equal(opened.tensors[name], tensors[original], err_msg=name)
    for name, key in (("q_proj", "attn_q"), ("k_proj", "attn_k")):
        np.testing.assert_array_equal(
            opened.tensors[f"{layer}self_attn.{name}.bias"], tensors[f"blk.1.{key}.weight"][:, 0]
        )
    assert opened.format == "gguf"
    assert opened.folder == tmp_path
    assert opened.config["attention_bias"] is True


@pytest.mark.parametrize(
    "kind", [Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0], ids=lambda q: q.name
)
def test_every_type_is_dequantised_to_float32(tmp_path, kind):
    tensors = llama_tensors()
    path = write_gguf(tmp_path / "m.gguf", tensors=tensors, quantisation=kind)
    read = open_checkpoint(path).tensors["model.layers.0.mlp.down_proj.weight"]
    original = tensors["blk.0.ffn_down.weight"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, gguf.dequantize(gguf.quantize(original, kind), kind))
    assert np.abs(read - original).max() < 0.5


def test_q4_1_blocks_are_decoded_as_documented(tmp_path):
    rng = np.random.default_rng(3)
    embedding = rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32)
    tensors = llama_tensors() | {"token_embd.weight": embedding}
    path = write_gguf(tmp_path / "m.gguf", tensors=tensors, quantisation=Q.Q4_1)
    # 20 bytes a block of 32: scale, minimum, then nibbles: low ones are 0-15, high ones 16-31.
    blocks = gguf.quantize(embedding, Q.Q4_1).reshape(-1, 20)
    scale, minimum = (blocks[:, i : i + 2].copy().view(np.float16) for i in (0, 2))
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    expected = nibbles * scale.astype(np.float32) + minimum.astype(np.float32)
    read = open_checkpoint(path).tensors["model.embed_tokens.weight"]
    np.testing.assert_array_equal(read, expected.reshape(VOCAB, HIDDEN))


def test_a_plain_llama_config_has_every_size(tmp_path):
    metadata = {
        "rope.freq_base": 100_000.0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 5,
    }
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", metadata=metadata)).config
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 100_000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": [2, 5],
        "pad_token_id": None,
        "attention_bias": False,
        "mlp_bias": False,
    }


def test_an_output_matrix_unties_the_embeddings(tmp_path):
    output = np.ones((VOCAB, HIDDEN), np.float32)
    tensors = llama_tensors() | {"output.weight": output}
    opened = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors=tensors))
    assert opened.config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(opened.tensors["lm_head.weight"], output)


def llama3_divisors(factor: float, original: int, theta: float, head_dim: int) -> np.ndarray:
    """Wave by wave, as the llama3 rule is written down: long waves slowed, short ones kept."""
    divisors = []
    for i in range(head_dim // 2):
        wave = 2 * math.pi * theta ** (2 * i / head_dim)
        if wave < original / 4:
            divisors.append(1.0)
        elif wave > original:
            divisors.append(factor)
        else:
            smooth = (original / wave - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_llama3_scaling_is_recognised_by_its_divisors(tmp_path):
    metadata = {"rope.freq_base": 500_000.0, "attention.key_length": 128}
    freqs = llama3_divisors(32.0, 8192, 500_000.0, 128)
    tensors = llama_tensors() | {"rope_freqs.weight": freqs}
    opened = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors=tensors, metadata=metadata))
    assert opened.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in opened.tensors
    tensors["rope_freqs.weight"] = np.linspace(1, 8, 64, dtype=np.float32)
    with pytest.raises(UnsupportedModel, match="rope_freqs"):
        open_checkpoint(write_gguf(tmp_path / "n.gguf", tensors=tensors, metadata=metadata))


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"rope.scaling.type": "none"}, None),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
    ],
)
def test_rope_scaling_keys_become_a_rope_scaling_table(tmp_path, metadata, expected):
    path = write_gguf(tmp_path / "m.gguf", metadata=metadata)
    assert open_checkpoint(path).config["rope_scaling"] == expected


def test_gemma_norms_are_stored_as_applied_and_come_back_as_trained(tmp_path):
    tensors = llama_tensors()
    for layer in range(LAYERS):
        for name in ("post_attention_norm", "post_ffw_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = np.full(HIDDEN, 1.5, np.float32)
        for name in ("attn_q_norm", "attn_k_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = np.full(HEAD_DIM, 1.25, np.float32)
    metadata = {"attention.sliding_window": 64, "block_count": 7}
    for layer in range(LAYERS, 7):
        tensors |= layer_tensors(np.random.default_rng(layer), layer)
    opened = open_checkpoint(write_gguf(tmp_path / "m.gguf", "gemma3", tensors, metadata))
    read = opened.tensors
    layer = "model.layers.0."
    assert (read[layer + "post_attention_layernorm.weight"] == 0.5).all()
    assert (read[layer + "post_feedforward_layernorm.weight"] == 0.5).all()
    assert (read[layer + "self_attn.q_norm.weight"] == 0.25).all()
    for name, stored in (
        ("model.norm.weight", "output_norm.weight"),
        (layer + "pre_feedforward_layernorm.weight", "blk.0.ffn_norm.weight"),
    ):
        np.testing.assert_array_equal(read[name], tensors[stored] - 1)
    for name, stored in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        (layer + "self_attn.q_proj.weight", "blk.0.attn_q.weight"),
    ):
        np.testing.assert_array_equal(read[name], tensors[stored])
    config = opened.config
    assert config["model_type"] == "gemma3_text"
    assert config["layer_types"] == ["sliding_attention"] * 5 + [
        "full_attention",
        "sliding_attention",
    ]
    assert config["rope_local_base_freq"] == 10_000.0
    assert config["query_pre_attn_scalar"] == HEAD_DIM


def test_gemma2_alternates_and_caps(tmp_path):
    metadata = {
        "attention.sliding_window": 64,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "attention.key_length": 16,
    }
    tensors = {k: v for k, v in llama_tensors().items() if "attn_q" not in k}
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", "gemma2", tensors, metadata)).config
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    assert config["attn_logit_softcapping"] == 50.0
    assert config["final_logit_softcapping"] == 30.0
    assert config["head_dim"] == config["query_pre_attn_scalar"] == 16
    assert config["hidden_activation"] == "gelu_pytorch_tanh"


def test_phi3_keeps_its_fused_matrices_and_long_rope(tmp_path):
    tensors = {
        name: tensor
        for name, tensor in llama_tensors().items()
        if not any(part in name for part in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"))
    }
    for layer in range(LAYERS):
        tensors[f"blk.{layer}.attn_qkv.weight"] = np.ones((64, HIDDEN), np.float32)
        tensors[f"blk.{layer}.ffn_up.weight"] = np.ones((2 * FFN, HIDDEN), np.float32)
    tensors["rope_factors_long.weight"] = np.array([1, 2, 3], np.float32)
    tensors["rope_factors_short.weight"] = np.array([1, 1, 2], np.float32)
    metadata = {
        "rope.scaling.original_context_length": 128,
        "rope.scaling.attn_factor": 1.25,
        "rope.dimension_count": 6,
        "attention.sliding_window": 300,
    }
    opened = open_checkpoint(write_gguf(tmp_path / "m.gguf", "phi3", tensors, metadata))
    assert opened.tensors["model.layers.1.self_attn.qkv_proj.weight"].shape == (64, HIDDEN)
    assert opened.tensors["model.layers.1.mlp.gate_up_proj.weight"].shape == (2 * FFN, HIDDEN)
    assert opened.config["rope_scaling"] == {
        "rope_type": "longrope",
        "long_factor": [1.0, 2.0, 3.0],
        "short_factor": [1.0, 1.0, 2.0],
        "original_max_position_embeddings": 128,
        "attention_factor": 1.25,
    }
    assert opened.config["partial_rotary_factor"] == 0.75
    assert opened.config["sliding_window"] == 300
    assert opened.config["original_max_position_embeddings"] == 128


@pytest.mark.parametrize(("architecture", "norms"), [("qwen2", False), ("qwen3", True)])
def test_qwen_rows_stay_in_order(tmp_path, architecture, norms):
    tensors = llama_tensors()
    if norms:
        tensors["blk.0.attn_q_norm.weight"] = np.full(HEAD_DIM, 1.25, np.float32)
    else:
        tensors["blk.0.attn_q.bias"] = np.arange(HIDDEN, dtype=np.float32)
    opened = open_checkpoint(write_gguf(tmp_path / "m.gguf", architecture, tensors))
    assert opened.config["model_type"] == architecture
    query = "model.layers.0.self_attn.q_proj"
    np.testing.assert_array_equal(opened.tensors[query + ".weight"], tensors["blk.0.attn_q.weight"])
    if norms:
        assert (opened.tensors["model.layers.0.self_attn.q_norm.weight"] == 1.25).all()
    else:
        assert (opened.tensors[query + ".bias"] == np.arange(HIDDEN)).all()


@pytest.mark.parametrize(
    ("architecture", "metadata", "extra", "reason"),
    [
        ("mamba", {}, {}, "architecture 'mamba'"),
        ("llama", {"expert_count": 8}, {}, "mixture of experts"),
        ("llama", {"split.count": 2}, {}, "split file"),
        ("llama", {"attention.head_count_kv": [2, 1]}, {}, "differs between layers"),
        ("llama", {"rope.scaling.type": "odd"}, {}, "rope scaling 'odd'"),
        ("llama", {}, {"blk.0.attn_rel_b.weight": np.ones(4, np.float32)}, "attn_rel_b"),
    ],
)
def test_what_is_no_plain_decoder_is_refused_by_name(
    tmp_path, architecture, metadata, extra, reason
):
    path = write_gguf(tmp_path / "m.gguf", architecture, llama_tensors() | extra, metadata)
    with pytest.raises(UnsupportedModel, match=reason):
        open_checkpoint(path)


def test_a_truncated_file_is_told_at_open_wherever_it_was_cut(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", metadata={"tokenizer.ggml.tokens": ["a", "bc"]})
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 307), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptWeights, match=r"m\.gguf"):
            open_checkpoint(path)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 2500), st.integers(0, 255)), max_size=6))
def test_a_damaged_header_opens_or_raises_a_typed_error(tmp_path, edits):
    path = tmp_path / "m.gguf"
    if not path.exists():
        write_gguf(path, metadata={"tokenizer.ggml.tokens": ["a", "bc"]})
    damaged = bytearray(path.read_bytes())
    for place, byte in edits:
        damaged[place] = byte
    copy = tmp_path / "damaged" / "m.gguf"
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(damaged)
    with contextlib.suppress(KVJaxError):
        open_checkpoint(copy)


def test_a_folder_with_one_file_opens_as_that_file(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    by_folder, by_file = open_checkpoint(tmp_path), open_checkpoint(path)
    assert by_folder.path == path
    assert by_folder.fingerprint == by_file.fingerprint
    other = write_gguf(tmp_path / "other.gguf", tensors=llama_tensors(seed=1))
    assert open_checkpoint(other).fingerprint != by_file.fingerprint


@pytest.mark.model
def test_the_default_model_has_the_weights_that_transformers_loads(smollm2_path):
    opened = open_checkpoint("smollm2-135m")
    assert isinstance(opened, GGUFCheckpoint)
    assert opened.path == smollm2_path
    assert opened.config["rope_theta"] == 100_000.0
    assert opened.config["eos_token_id"] == [2]
    assert len(opened.tensors) == 272
    # Digests of what transformers 5.23 makes of the same file.
    for name, digest in GOLDEN.items():
        values = opened.tensors[name]
        assert values.dtype == np.float32
        assert hashlib.sha256(values.tobytes()).hexdigest()[:16] == digest, name


GOLDEN = {
    "model.embed_tokens.weight": "3fd491c8066dd9dc",
    "model.norm.weight": "3b87f8e27335e67f",
    "model.layers.0.self_attn.q_proj.weight": "54b377bbfa2deab9",
    "model.layers.17.self_attn.k_proj.weight": "c2c30f32fb4b4c6f",
    "model.layers.29.self_attn.v_proj.weight": "ccd13910de7a7987",
    "model.layers.29.mlp.down_proj.weight": "c19605745425a11e",
}
