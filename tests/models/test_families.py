"""Every model family against transformers, on tiny random models whose weights are in `golden/`."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from kvjax.errors import CorruptWeights, UnsupportedModel
from kvjax.models import (
    FAMILIES,
    Family,
    Transformer,
    kv_spec,
    llama,
    load_model,
    model_config,
    random_tensors,
    register_family,
)
from kvjax.models.loading import WeightDtype
from tests.models.golden_cases import FAMILIES as GOLDEN_FAMILIES
from tests.models.golden_cases import GoldenCase, all_cases, load_family
from tests.models.run_model import PagedRun, logits_in_one_step

QUICK = ("deepseek_v2", "gemma2", "llama")  # the others meet narrow weights in slow runs only
FIRST_CASES = [
    pytest.param(
        family, next(iter(load_family(family))), marks=() if family in QUICK else pytest.mark.slow
    )
    for family in GOLDEN_FAMILIES
]
WINDOWED = [("mistral", "window"), ("qwen2", "mixed"), ("gemma2", "capped"), ("smollm3", "window")]


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    """Nothing here depends on how well XLA optimises, and the time goes into compiling."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def load(case: GoldenCase, dtype: WeightDtype = "float32") -> Transformer:
    """Our model of a case; rotary tables as long as the longest sequence (some depend on it)."""
    longest = max(map(len, case.ids))
    return load_model(model_config(case.config), case.tensors, dtype=dtype, num_positions=longest)


@pytest.mark.parametrize(("family", "name"), all_cases())
def test_logits_equal_those_of_transformers(family: str, name: str) -> None:
    case = load_family(family)[name]
    ours = logits_in_one_step(load(case), case.ids)
    for mine, theirs in zip(ours, case.logits, strict=True):
        assert np.abs(theirs).max() > 1  # the comparison is about something
        np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "name"), all_cases())
def test_configurations_of_transformers_4_and_5_mean_the_same(family: str, name: str) -> None:
    case = load_family(family)[name]
    assert model_config(case.config) == model_config(case.saved)


@pytest.mark.parametrize(
    ("family", "name"), [*WINDOWED, ("llama", "plain"), ("deepseek_v2", "yarn")]
)
def test_chunks_and_single_tokens_give_the_logits_of_the_whole(family: str, name: str) -> None:
    case = load_family(family)[name]
    long, short = case.ids
    run = PagedRun(load(case), num_seqs=2, max_len=len(long), max_tokens=len(long) + len(short))
    first, second = [], []
    for chunk in (long[:33], long[33:50]):  # alone
        first.append(run.step({0: chunk})[0])
    mixed = run.step({1: short[:5], 0: long[50:64]})  # beside the other sequence
    first.append(mixed[0])
    second.append(mixed[1])
    for i in range(4):
        one = run.step({0: long[64 + i : 65 + i], 1: short[5 + i : 6 + i]}, decode=True)
        first.append(one[0])
        second.append(one[1])
    mixed = run.step({0: long[68:]})
    first.append(mixed[0])
    np.testing.assert_allclose(np.concatenate(first), case.logits[0], atol=1e-4, rtol=0)
    np.testing.assert_allclose(np.concatenate(second), case.logits[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_gemma_3_with_an_image_encoder_is_read_as_its_text_model(prefix: str) -> None:
    case = load_family("gemma3_text")["linear"]
    nested = {"model_type": "gemma3", "text_config": case.config, "vision_config": {"depth": 3}}
    wrapped = {
        (prefix + name if prefix == "language_model." else name.replace("model.", prefix, 1)): w
        for name, w in case.tensors.items()
    }
    wrapped["vision_tower.embeddings.weight"] = np.zeros(3, np.float16)
    config = model_config(nested)
    plain = dataclasses.replace(model_config(case.config), architecture="gemma3")
    assert config == plain
    model = load_model(config, wrapped, dtype="float32", num_positions=70)
    ours = logits_in_one_step(model, case.ids)
    np.testing.assert_allclose(ours[0], case.logits[0], atol=1e-4, rtol=0)


def test_gemma_takes_no_notice_of_the_old_name_of_its_activation() -> None:
    case = load_family("gemma2")["capped"]
    assert model_config(case.config | {"hidden_act": "gelu"}).activation == "gelu_tanh"


def test_gemma_3_without_layer_types_has_five_sliding_layers_to_one() -> None:
    config = model_config(
        {
            "model_type": "gemma3",
            "eos_token_id": [1, 106],
            "text_config": {  # as published for 4B: the rest are defaults
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
        }
    )
    assert [layer for layer in range(34) if config.window(layer) is None] == [5, 11, 17, 23, 29]
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert config.rope.theta == 1e6
    assert (config.rope.scaling, config.rope.factor) == ("linear", 8.0)
    assert config.local_rope is not None
    assert (config.local_rope.theta, config.local_rope.scaling) == (10_000.0, "none")
    assert config.eos_token_ids == (1, 106)
    assert config.tie_embeddings


@pytest.mark.parametrize(("family", "name"), FIRST_CASES)
def test_bfloat16_is_close_to_float32(family: str, name: str) -> None:
    case = load_family(family)[name]
    ours = logits_in_one_step(load(case, "bfloat16"), case.ids)
    assert _cosine(ours[0], case.logits[0]) > 0.999


@pytest.mark.parametrize(("family", "name"), FIRST_CASES)
def test_int8_is_close_to_float32(family: str, name: str) -> None:
    case = load_family(family)[name]
    ours = logits_in_one_step(load(case, "int8"), case.ids)
    assert _cosine(ours[0], case.logits[0]) > 0.99


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


@pytest.mark.parametrize(("family", "name"), all_cases())
def test_random_weights_have_the_names_and_shapes_of_the_checkpoint(family: str, name: str) -> None:
    case = load_family(family)[name]
    config = model_config(case.config)
    tensors = FAMILIES[config.architecture].tensors(case.tensors, config)
    drawn = random_tensors(config)
    assert {n: w.shape for n, w in drawn.items()} == {n: tensors[n].shape for n in tensors}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": "4", "head_dim": None}, "malformed"),
        ({"num_attention_heads": 0, "head_dim": None}, "malformed"),
        ({"rope_scaling": "linear", "rope_parameters": None}, "malformed"),
        ({"num_hidden_layers": 2.5}, r"num_layers must be an integer of at least 1, got 2\.5"),
        ({"vocab_size": None}, "vocab_size must be an integer of at least 1, got None"),
        ({"rms_norm_eps": None}, "norm_eps must be a number"),
        ({"eos_token_id": "</s>"}, "eos token ids must be integers, got '</s>'"),
    ],
)
def test_a_malformed_configuration_is_told_as_such(change: dict[str, Any], said: str) -> None:
    case = load_family("llama")["plain"]
    with pytest.raises(ValueError, match=said):
        model_config(case.config | change)


def test_a_family_from_outside_the_package_is_loaded() -> None:
    case = load_family("llama")["plain"]
    fused = {f"decoder.{name}": w for name, w in case.tensors.items()}

    def config(hf):
        return llama.config({**case.config, **hf})

    def tensors(stored, config):
        return {name.removeprefix("decoder."): w for name, w in stored.items()}

    register_family("outsider", Family(config, tensors))
    try:
        model = load_model(
            model_config({"model_type": "outsider"}), fused, dtype="float32", num_positions=70
        )
        np.testing.assert_allclose(
            logits_in_one_step(model, case.ids)[0], case.logits[0], atol=1e-4, rtol=0
        )
    finally:
        del FAMILIES["outsider"]


LLAMA = load_family("llama")["plain"].config
DEEPSEEK = load_family("deepseek_v3")["interleaved"].config


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; supported are .*'llama'"),
        ({}, "None is not supported"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts.*=8"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "mixture of experts.*=128"),
        (DEEPSEEK | {"first_k_dense_replace": 1, "n_routed_experts": 64}, "from layer 1 of 2"),
        (DEEPSEEK | {"first_k_dense_replace": None}, "mixture-of-experts"),
        (LLAMA | {"quantization_config": {"quant_method": "awq"}}, "'awq' are not read"),
        (LLAMA | {"hidden_act": "relu"}, "activation 'relu'"),
        (LLAMA | {"rope_scaling": {"type": "xpos", "factor": 2.0}}, "rope scaling 'xpos'"),
        (LLAMA | {"rope_parameters": {"full_attention": {}}}, "per layer type"),
        ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "no 'hidden_size'"),
        (
            load_family("qwen2")["mixed"].config | {"layer_types": ["linear_attention"] * 2},
            "'linear_attention'",
        ),
        (
            load_family("gemma3_text")["plain"].config | {"use_bidirectional_attention": True},
            "use_bidirectional_attention",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(hf: dict, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        model_config(hf)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_missing_and_misshapen_tensors_are_named(family: str) -> None:
    case = next(iter(load_family(family).values()))
    config = model_config(case.config)
    name = f"model.layers.1.mlp.{'gate_up' if family == 'phi3' else 'up'}_proj.weight"
    without = {n: w for n, w in case.tensors.items() if n != name}
    with pytest.raises(CorruptWeights, match=r"model\.layers\.1\.mlp"):
        load_model(config, without, dtype="float32", num_positions=8)
    with pytest.raises(CorruptWeights, match=r"model\.layers\.1\.mlp.*the configuration implies"):
        load_model(
            config, without | {name: case.tensors[name][:-1]}, dtype="float32", num_positions=8
        )


def test_kv_bytes_are_exact_for_every_kind_of_group() -> None:
    def of(family: str, name: str, dtype: str = "float32"):
        return kv_spec(model_config(load_family(family)[name].config), dtype, 16)

    plain = of("llama", "plain", "bfloat16")
    assert [group.kind for group in plain.groups] == ["full"]
    assert plain.bytes(100) == 100 * 2 * 2 * (16 + 16) * 2  # layers, heads, k and v, bytes
    assert plain.page_bytes == plain.bytes(16)

    latent = of("deepseek_v3", "interleaved")
    assert [(g.kind, g.num_kv_heads, g.v_width) for g in latent.groups] == [("latent", 1, 0)]
    assert latent.bytes(10) == 10 * 2 * (24 + 8) * 4

    for family, name in (("gemma2", "capped"), ("gemma3_text", "plain")):
        spec = of(family, name)
        assert [(g.kind, g.window, g.layers) for g in spec.groups] == [
            ("sliding", 12, (0, 2)),
            ("full", None, (1,)),
        ]
        assert spec.group_of == (0, 1, 0)
        assert spec.group_bytes(3) == (3 * 2 * 2 * 32 * 4, 3 * 1 * 2 * 32 * 4)

    assert [(g.kind, g.window) for g in of("mistral", "window").groups] == [("sliding", 12)]
    assert [g.layers for g in of("qwen2", "mixed").groups] == [(0,), (1,)]
