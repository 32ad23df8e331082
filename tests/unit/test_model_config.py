"""What is read of a config.json, beside what transformers (and so every engine) reads of the same file."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from checkpoint_conversion.architectures import read_shape, shape_of
from checkpoint_conversion.rules import ConversionError
from igpo_megatron.plan.model_shape import KNOWN

BASE: dict[str, Any] = {
    "architectures": ["X"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "rope_theta": 1e6,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def variant(model_type: str, *without: str, **changes: Any) -> dict[str, Any]:
    """A small config.json of a family, without some keys, with others."""
    config = {"model_type": model_type, **BASE, **changes}
    return {key: value for key, value in config.items() if key not in without}


READ = {
    "mixtral without rope_theta": variant("mixtral", "rope_theta", **EXPERTS),
    "mixtral without kv heads": variant("mixtral", "num_key_value_heads", **EXPERTS, num_attention_heads=16),
    "mixtral without eps": variant("mixtral", "rms_norm_eps", **EXPERTS),
    "mixtral without window": variant("mixtral", max_position_embeddings=32768, **EXPERTS),
    "mistral without kv heads": variant("mistral", "num_key_value_heads", num_attention_heads=16, sliding_window=None),
    "mistral without eps": variant("mistral", "rms_norm_eps", sliding_window=None),
    "mistral without theta": variant("mistral", "rope_theta", sliding_window=None),
    "mistral without max positions": variant("mistral", "max_position_embeddings", sliding_window=None),
    "qwen2 without kv heads": variant("qwen2", "num_key_value_heads", num_attention_heads=64, hidden_size=256),
    "qwen2 with kv heads null": variant("qwen2", num_key_value_heads=None),
    "qwen2 without eps": variant("qwen2", "rms_norm_eps"),
    "qwen2 theta beside rope_parameters": variant("qwen2", rope_parameters={"rope_type": "default"}),
    "qwen2 window off": variant("qwen2", use_sliding_window=False, sliding_window=256, max_window_layers=2),
    "qwen2 attention_bias false": variant("qwen2", attention_bias=False),
    "qwen3 without head_dim": variant("qwen3"),
    "qwen3 as transformers 5 writes it": variant("qwen3", "rope_theta", rope_parameters={"rope_type": "default", "rope_theta": 5e6}),
    "qwen3_moe without head_dim": variant("qwen3_moe", **{**QWEN_EXPERTS, "head_dim": None}),
    "qwen3_moe without norm_topk_prob": variant("qwen3_moe", **QWEN_EXPERTS),
    "qwen3_moe without expert size": variant("qwen3_moe", num_experts=4, num_experts_per_tok=2),
    "llama without rope_theta": variant("llama", "rope_theta"),
    "llama without tie": variant("llama", "tie_word_embeddings"),
    "llama with head_dim null": variant("llama", head_dim=None),
    "llama with several ends": variant("llama", eos_token_id=[1, 2, 3]),
    "llama cut in parts": variant("llama", pretraining_tp=2),
    "llama3 scaling": variant("llama", "rope_theta", rope_parameters={**LLAMA3, "original_max_position_embeddings": 8192}),
    "both spellings of rope, alike": variant(
        "llama", rope_scaling={"type": "default"}, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
}


@pytest.mark.parametrize("name", READ)
def test_every_number_is_the_one_that_transformers_reads(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(READ[name]))
    ours, theirs = read_shape(tmp_path), AutoConfig.from_pretrained(tmp_path)
    rope = theirs.rope_parameters
    assert (ours.rope_theta, ours.norm_eps, ours.max_positions) == (rope["rope_theta"], theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert (ours.tied, ours.dtype) == (theirs.tie_word_embeddings, str(theirs.dtype).removeprefix("torch."))
    assert (ours.rope_scaling is None) == (rope["rope_type"] == "default")
    assert getattr(theirs, "sliding_window", None) is None and rope.get("partial_rotary_factor") is None
    if ours.mixture is not None:
        assert (ours.mixture.num_experts, ours.mixture.top_k) == (theirs.num_local_experts, theirs.num_experts_per_tok)
        assert ours.mixture.ffn_size == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
        assert ours.mixture.sums_to_one == getattr(theirs, "norm_topk_prob", True)


PUBLISHED = {
    "Qwen2.5 with its window switched off": variant(
        "qwen2",
        use_sliding_window=False,
        sliding_window=131072,
        max_window_layers=28,
        use_mrope=False,
        use_cache=True,
        hidden_act="silu",
        attention_dropout=0.0,
        initializer_range=0.02,
        bos_token_id=1,
        eos_token_id=2,
        transformers_version="4.43.1",
        rope_scaling=None,
    ),
    "Qwen3 as saved by a later version": variant(
        "qwen3",
        layer_types=["full_attention", "full_attention"],
        attention_bias=False,
        sliding_window=None,
        use_sliding_window=False,
        max_window_layers=36,
        head_dim=32,
    ),
    "SmolLM2": variant(
        "llama",
        is_llama_config=True,
        rope_interleaved=False,
        pretraining_tp=1,
        mlp_bias=False,
        pad_token_id=2,
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    ),
    "a fine-tuned Llama": variant(
        "llama",
        _name_or_path="/data/base",
        _attn_implementation_autoset=True,
        unsloth_fixed=True,
        unsloth_version="2025.1",
        auto_map={"AutoModelForCausalLM": "modeling.X"},
        max_sequence_length=2048,
        temperature=0.6,
        top_p=0.9,
        attention_bias=False,
        id2label={"0": "a"},
        label2id={"a": 0},
    ),
    "Mixtral": variant("mixtral", **EXPERTS, router_aux_loss_coef=0.02, output_router_logits=False, router_jitter_noise=0.0),
    "Qwen3-MoE": variant(
        "qwen3_moe",
        **QWEN_EXPERTS,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        n_shared_experts=0,
        router_aux_loss_coef=0.001,
        norm_topk_prob=True,
    ),
    "Qwen3-Coder": variant("qwen3_moe", **QWEN_EXPERTS, qkv_bias=False, use_qk_norm=True, shared_expert_intermediate_size=0),
    "Ministral": variant("mistral", sliding_window=32768, max_position_embeddings=32768, head_dim=128, attention_dropout=0.0),
    "an unquantized model that says so": variant("llama", quantization_config=None, rope_scaling={}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_of_published_folders_that_change_nothing_are_passed_over(name):
    assert shape_of(PUBLISHED[name]).hidden_size == 64


@pytest.mark.parametrize("name", KNOWN)
def test_every_model_known_by_name_can_be_read(name):
    assert shape_of(KNOWN[name]).num_layers == KNOWN[name]["num_hidden_layers"]


WINDOW = {"use_sliding_window": True, "sliding_window": 256}
REFUSED = [
    (variant("qwen3", qkv_bias=True), "qkv_bias=true .qwen3 is built with false"),
    (variant("llama", use_qk_norm=True), "use_qk_norm=true .llama is built with false"),
    (variant("llama", rope_theta=10**400), "rope_theta=10+.*expected a number above 0"),
    (variant("qwen2", num_hidden_layers=2**30), "num_hidden_layers is 1073741824; no model has more than 10,000"),
    (variant("qwen2", max_position_embeddings=10**400), "max_position_embeddings=10+"),
    (variant("llama", rope_scaling={**LLAMA3, "factor": 0.5}), "factor=0.5 .expected a number of at least 1"),
    # Another forward pass.
    (variant("qwen2", rope_scaling=YARN, rope_parameters={"rope_type": "default", "rope_theta": 1e6}), "rope_scaling.*they differ"),
    (variant("qwen2", rope_scaling={**YARN, "type": "yarn"}), "rope scaling 'yarn'"),
    (variant("qwen2", rope_scaling={"type": "mrope", "rope_type": "default", "mrope_section": [8, 4, 4]}), "mrope"),
    (variant("llama", rope_scaling={"type": "dynamic", "factor": 2.0}), "rope scaling 'dynamic'"),
    (variant("llama", rope_scaling={"type": "linear", "factor": 2.0}), "rope scaling 'linear'"),
    (variant("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "rope_theta=1000000.0 beside rope_theta=500000.0"),
    (variant("llama", rope_scaling="yarn"), "rope_scaling='yarn'.*object"),
    (variant("llama", partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    (variant("qwen2", rope_parameters={"rope_theta": 1e6, "partial_rotary_factor": 0.5}), "partial_rotary_factor=0.5"),
    (variant("qwen2", dual_chunk_attention_config={"chunk_size": 128}), "dual_chunk_attention_config="),
    (variant("qwen2", **WINDOW, max_window_layers=1), "sliding window of 256"),
    (variant("qwen2", **WINDOW), "sliding window of 256"),
    (variant("qwen3_moe", **QWEN_EXPERTS, **WINDOW), "sliding window of 256"),
    (variant("mistral"), "no sliding_window, for which mistral has 4096"),
    (variant("mistral", max_position_embeddings=32768), "no sliding_window"),
    (variant("qwen3_moe", decoder_sparse_step=2, **QWEN_EXPERTS), "in some layers only"),
    (variant("qwen3_moe", **QWEN_EXPERTS, num_local_experts=8), "num_experts=4 beside num_local_experts=8"),
    (variant("llama", logits_scaling=8.0, embedding_multiplier=12.0), "logits_scaling=8.0.*embedding_multiplier=12.0"),
    (variant("llama", scale_depth=1.4, dim_model_base=256), "scale_depth=1.4.*dim_model_base=256"),
    (variant("llama", attention_multiplier=0.1), "attention_multiplier=0.1"),
    (variant("qwen2", final_logit_softcapping=30.0), "final_logit_softcapping=30.0"),
    (variant("qwen2", is_causal=False), "is_causal=false"),
    (variant("llama", rope_interleaved=True), "rope_interleaved=true"),
    (variant("llama", attention_bias=True), "attention_bias=true"),
    (variant("llama", hidden_act="swish"), "hidden_act='swish'"),
    (variant("llama", compression_config={"quant_method": "compressed-tensors"}), "quantized weights"),
    (variant("llama", quantization={"bits": 4}), "quantized weights"),
    (variant("qwen2", some_new_attention="ring"), "some_new_attention='ring' .no rule knows this key"),
    (variant("qwen2", per_layer_config={"1": {"hidden_act": "gelu"}}), "per_layer_config="),
    # Values of no use.
    (variant("qwen2", rope_theta=None), "rope_theta=null"),
    (variant("qwen2", "rope_theta", rope_parameters={"rope_type": "default", "rope_theta": None}), "rope_theta=null"),
    (variant("qwen2", rope_theta=0), "rope_theta=0"),
    (variant("qwen2", rms_norm_eps=None), "rms_norm_eps is null.*expected float"),
    (variant("qwen2", rms_norm_eps=float("nan")), "rms_norm_eps=NaN"),
    (variant("qwen2", max_position_embeddings=None), "max_position_embeddings is null.*expected int"),
    (variant("qwen2", max_position_embeddings="512"), "max_position_embeddings is '512'"),
    (variant("qwen2", max_position_embeddings=0), "max_position_embeddings=0"),
    (variant("qwen2", hidden_act=None), "hidden_act is null"),
    (variant("qwen2", tie_word_embeddings=None), "tie_word_embeddings is null"),
    (variant("qwen2", torch_dtype="auto"), "dtype='auto'"),
    (variant("qwen2", num_hidden_layers=2.0), "does not give num_hidden_layers as integers above 0 .num_hidden_layers is 2.0"),
    (variant("qwen2", num_hidden_layers=True), "num_hidden_layers is true"),
    (variant("qwen2", vocab_size=0), "vocab_size is 0"),
    (variant("qwen2", hidden_size=66), "hidden_size=66 with num_attention_heads=4"),
    (variant("qwen2", num_key_value_heads=3), "num_attention_heads=4 with num_key_value_heads=3"),
    (variant("qwen2", num_key_value_heads=0), "num_key_value_heads=0"),
    (variant("qwen3", head_dim=15), "head_dim=15"),
    (variant("qwen2", head_dim="16"), "head_dim='16'"),
    (variant("mixtral", num_local_experts=4, num_experts_per_tok=5), "num_experts_per_tok=5 of 4"),
    (variant("llama", id2label={"a": "b"}), "does not take"),
    ({"model_type": "qwen2", "text_config": variant("qwen2")}, "does not give num_hidden_layers"),
]


@pytest.mark.parametrize("config, message", REFUSED, ids=[message for _, message in REFUSED])
def test_what_would_be_computed_otherwise_or_not_at_all_is_refused_in_one_sentence(config, message):
    with pytest.raises(ConversionError, match=message) as error:
        shape_of(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ['{"model_type": "qwen2", "hidden_', "", "[" * 5000, "[1]", "9" * 5000, "\ufeff{}"])
def test_half_a_config_is_one_sentence(text, tmp_path):
    path: Path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConversionError, match=r"config\.json (is not JSON|holds a list)"):
        read_shape(tmp_path)
