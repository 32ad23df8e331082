"""Conversion between Hugging Face and Megatron folders: rules, tables, folders, command line. No Megatron here."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from checkpoint_conversion.architectures import ARCHITECTURES, WHY_NOT, check_total, local_name, read_shape, rules_for, shape_of
from checkpoint_conversion.commands import app
from checkpoint_conversion.convert import hf_to_megatron, megatron_to_hf, verify
from checkpoint_conversion.hf_folder import HF_INDEX, HfReader
from checkpoint_conversion.rules import ConversionError, Copy, GateUp, PadVocab, Qkv, Row, Tied
from checkpoint_conversion.torch_dist_folder import MegatronReader, Place, place_of

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
}
CONFIGS = {
    "qwen2": {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": False},
    "qwen2_tied": {"model_type": "qwen2", "rope_theta": 1e6, "rope_scaling": None, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": False},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "rope_theta": 1e6, "sliding_window": None, "tie_word_embeddings": False},
    "mixtral": {
        "model_type": "mixtral",
        "rope_theta": 1e6,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "rope_theta": 1e6,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
}


def hf_folder(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    """A random model as transformers writes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {**SMALL, **CONFIGS[kind]}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def assert_same_bits(left: Path, right: Path) -> None:
    a, b = HfReader(left), HfReader(right)
    assert a.names() == b.names()
    for name in a.names():
        assert a.get(name).dtype == b.get(name).dtype
        assert torch.equal(a.get(name), b.get(name)), name


# ---- rules


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    "rule, shapes",
    [
        (Copy("norm", ("n",)), [(8,)]),
        (Row("proj", ("o",)), [(6, 8)]),
        (GateUp("fc1", ("g", "u")), [(12, 5), (12, 5)]),
        (Qkv("qkv", ("q", "k", "v"), num_kv_heads=4, head_dim=3), [(24, 5), (12, 5), (12, 5)]),
        (Qkv("qkv.bias", ("q", "k", "v"), num_kv_heads=4, head_dim=3), [(24,), (12,), (12,)]),
        (PadVocab("embedding", ("e",), vocab_size=13, multiple=8), [(13, 5)]),
    ],
    ids=lambda value: getattr(value, "megatron_name", None),
)
def test_every_rule_round_trips_at_every_tensor_parallel_degree(rule, shapes, tp):
    tensors = [torch.randn(shape) for shape in shapes]
    full = rule.to_megatron(tensors)
    shards = [rule.shard(full, tp, rank) for rank in range(tp)]
    assert len({shard.shape for shard in shards}) == 1
    assert torch.equal(rule.unshard(shards), full)
    assert all(torch.equal(a, b) for a, b in zip(rule.to_hf(rule.unshard(shards)), tensors, strict=True))
    if rule.split_dim is not None:
        assert shards[0].shape[rule.split_dim] * tp == full.shape[rule.split_dim]


def test_query_key_value_rows_are_interleaved_per_group():
    # Two groups, two query heads each, head_dim 1: q0 q1 k0 v0 | q2 q3 k1 v1.
    rule = Qkv("qkv", ("q", "k", "v"), num_kv_heads=2, head_dim=1)
    full = rule.to_megatron([torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])])
    assert full.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert rule.shard(full, 2, 1).tolist() == [2, 3, 11, 21]


def test_a_rank_holds_its_part_of_the_gate_above_its_part_of_the_up_projection():
    rule = GateUp("fc1", ("gate", "up"))
    full = rule.to_megatron([torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11, 12, 13])])
    assert rule.shard(full, 2, 0).tolist() == [0, 1, 10, 11]
    assert rule.unshard([torch.tensor([0, 1, 10, 11]), torch.tensor([2, 3, 12, 13])]).tolist() == full.tolist()


def test_the_vocabulary_is_padded_with_zero_rows_and_any_padding_is_cut_back():
    rule = PadVocab("embedding", ("e",), vocab_size=3, multiple=4)
    full = rule.to_megatron([torch.ones(3, 2)])
    assert full.sum(1).tolist() == [2, 2, 2, 0]
    (cut,) = rule.to_hf(torch.ones(8, 2))
    assert cut.shape == (3, 2)


def test_a_tied_output_layer_reads_the_embedding_and_exports_nothing():
    rule = Tied("output_layer.weight", ("model.embed_tokens.weight",), vocab_size=3, multiple=4)
    assert rule.to_megatron([torch.ones(3, 2)]).shape == (4, 2)
    assert rule.to_hf(torch.ones(4, 2)) == []
    assert rule.exports == ()


def test_rules_refuse_what_they_would_silently_get_wrong():
    qkv = Qkv("qkv", ("q", "k", "v"), num_kv_heads=2, head_dim=4)
    with pytest.raises(ConversionError, match="config belongs to another model"):
        qkv.to_megatron([torch.ones(16, 2), torch.ones(16, 2), torch.ones(16, 2)])
    with pytest.raises(ConversionError, match="2 key-value heads"):
        qkv.shard(torch.ones(32, 2), 4, 0)
    with pytest.raises(ConversionError, match="one dtype"):
        GateUp("fc1", ("g", "u")).to_megatron([torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bfloat16)])
    with pytest.raises(ConversionError, match="vocab_size=3"):
        PadVocab("embedding", ("e",), vocab_size=3, multiple=4).to_megatron([torch.ones(5, 2)])
    with pytest.raises(ConversionError, match="tensor parallel 4 does not divide"):
        Row("proj", ("o",)).shard(torch.ones(2, 6), 4, 0)


# ---- tables


def test_both_spellings_of_rope_settings_read_alike():
    new = shape_of({**SMALL, **CONFIGS["llama3"]})
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    old = shape_of({**SMALL, "model_type": "llama", "rope_theta": 500000.0, "rope_scaling": scaling})
    assert new == old
    assert (new.rope_theta, new.rope_scaling) == (500000.0, {"factor": 8.0})
    assert shape_of({**SMALL, **CONFIGS["qwen2_tied"]}).rope_scaling is None


def test_missing_head_dim_and_key_value_heads_follow_from_the_rest():
    config = {key: value for key, value in SMALL.items() if key not in ("head_dim", "num_key_value_heads")}
    shape = shape_of({**config, "model_type": "llama"})
    assert (shape.head_dim, shape.num_kv_heads, shape.rope_theta, shape.tied) == (16, 4, 10000.0, False)


def test_an_unknown_architecture_is_refused_with_the_list_of_known_ones():
    with pytest.raises(
        ConversionError, match=r"'mamba' is not supported, because no table.*llama, mistral, mixtral, qwen2, qwen3, qwen3_moe"
    ):
        shape_of({**SMALL, "model_type": "mamba"})
    with pytest.raises(ConversionError, match=r"'gemma2' is not supported, because its attention caps logits"):
        shape_of({**SMALL, "model_type": "gemma2"})
    assert not set(WHY_NOT) & set(ARCHITECTURES)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
        ({"rope_parameters": {**LLAMA3_ROPE, "original_max_position_embeddings": 4096}}, "original_max_position_embeddings=4096.*8192"),
        ({"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": 2.0}}, "low_freq_factor=2.0"),
        ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, "sliding window of 32"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"vocab_size": None}, "does not give vocab_size"),
    ],
)
def test_what_megatron_would_silently_get_wrong_is_refused(change, message):
    with pytest.raises(ConversionError, match=message):
        shape_of({**SMALL, **CONFIGS["qwen2"], "rope_parameters": None, "rope_theta": 1e6, **change})


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("mistral", {"sliding_window": 32}, "sliding window of 32"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "in some layers only"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "in some layers only"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "one expert per token"),
        ("mixtral", {"num_local_experts": None}, "without num_experts"),
    ],
)
def test_what_a_family_has_of_its_own_and_megatron_would_get_wrong_is_refused(kind, change, message):
    shape_of({**SMALL, **CONFIGS[kind]})
    with pytest.raises(ConversionError, match=message):
        shape_of({**SMALL, **CONFIGS[kind], **change})


def test_a_sliding_window_that_is_switched_off_is_no_reason_to_refuse():
    shape_of({**SMALL, **CONFIGS["qwen2"], "use_sliding_window": False, "sliding_window": 32, "max_window_layers": 1})
    shape_of({**SMALL, **CONFIGS["mistral"], "sliding_window": SMALL["max_position_embeddings"]})


def test_all_problems_of_a_config_are_listed_at_once():
    with pytest.raises(ConversionError, match=r"hidden_act.*yarn"):
        shape_of({**SMALL, "model_type": "qwen2", "hidden_act": "relu", "rope_scaling": {"type": "yarn"}})


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_table_claims_a_name_twice(kind):
    rules = rules_for(shape_of({**SMALL, **CONFIGS[kind]}), 128)
    exported = [name for rule in rules.values() for name in rule.exports]
    assert len(exported) == len(set(exported))
    check_total(rules, hf_names=exported, megatron_names=rules)
    check_total(rules, megatron_names=[rule.te_name for rule in rules.values()])


def test_names_that_nobody_claims_and_claims_that_nothing_meets_are_listed():
    rules = rules_for(shape_of({**SMALL, **CONFIGS["qwen2"]}), 128)
    names = [name for rule in rules.values() for name in rule.exports]
    found = [*names[1:], "model.layers.0.mlp.experts.0.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    with pytest.raises(ConversionError) as error:
        check_total(rules, hf_names=found, megatron_names=[*rules, "decoder.layers.0.mlp.router.weight"])
    message = str(error.value)
    assert "model.layers.0.mlp.experts.0.weight: in the HF folder, but no rule claims it" in message
    assert f"{names[0]}: expected by the table, but not in the HF folder" in message
    assert "decoder.layers.0.mlp.router.weight: in the Megatron model, but no rule claims it" in message
    assert "inv_freq" not in message
    assert "(3 tensors)" in message


def test_a_name_claimed_by_two_rules_is_listed():
    rules = rules_for(shape_of({**SMALL, **CONFIGS["qwen2"]}), 128)
    names = [name for rule in rules.values() for name in rule.exports]
    rules["output_layer.weight"] = replace(rules["output_layer.weight"], hf_names=("model.norm.weight",))
    with pytest.raises(ConversionError, match=r"model.norm.weight: claimed by 2 rules"):
        check_total(rules, hf_names=names)


def test_transformer_engine_names_and_stored_keys_come_from_the_same_table():
    rules = rules_for(shape_of({**SMALL, **CONFIGS["qwen3"]}), 128)
    norm = rules["decoder.layers.1.input_layernorm.weight"]
    assert norm.te_name == "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    assert local_name("decoder.layers.12.mlp.linear_fc1.layer_norm_weight") == "decoder.layers.12.pre_mlp_layernorm.weight"
    assert local_name("decoder.final_layernorm.weight") == "decoder.final_layernorm.weight"
    assert place_of(norm) == Place("decoder.layers.self_attention.linear_qkv.layer_norm_weight", (1,))
    assert place_of(rules["output_layer.weight"]) == Place("output_layer.weight")


def test_experts_have_a_number_of_their_own_in_every_spelling():
    rules = rules_for(shape_of({**SMALL, **CONFIGS["qwen3_moe"]}), 128)
    rule = rules["decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight"]
    assert rule.hf_names == ("model.layers.1.mlp.experts.3.gate_proj.weight", "model.layers.1.mlp.experts.3.up_proj.weight")
    assert (rule.expert, rule.te_name) == (3, "decoder.layers.1.mlp.experts.linear_fc1.weight3")
    assert place_of(rule) == Place("decoder.layers.mlp.experts.experts.linear_fc1.weight", (1, 3))
    # The norm in front of experts is not fused into anything.
    assert place_of(rules["decoder.layers.0.pre_mlp_layernorm.weight"]) == Place("decoder.layers.pre_mlp_layernorm.weight", (0,))
    # A rank of pipeline stage 1 (one layer each) and expert rank 1 (two experts each) calls it layer 0, expert 1.
    for name in ("mlp.experts.linear_fc1.weight1", "mlp.experts.local_experts.1.linear_fc1.weight"):
        assert local_name(f"decoder.layers.0.{name}", first_layer=1, first_expert=2) == rule.megatron_name
    mixtral = rules_for(shape_of({**SMALL, **CONFIGS["mixtral"]}), 128)
    names = mixtral["decoder.layers.0.mlp.experts.local_experts.2.linear_fc1.weight"].hf_names
    assert names == tuple(f"model.layers.0.block_sparse_moe.experts.2.{part}.weight" for part in ("w1", "w3"))


def test_both_spellings_of_the_number_of_experts_read_alike():
    config = {**SMALL, **CONFIGS["qwen3_moe"]}
    renamed = {**{key: value for key, value in config.items() if key != "num_experts"}, "num_local_experts": 4}
    assert shape_of(config) == shape_of(renamed)
    assert shape_of(config).active_ffn_size == 2 * 48


# ---- folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_hf_to_megatron_to_hf_is_bit_equal(tmp_path, kind, dtype):
    hf = hf_folder(tmp_path / "hf", kind, dtype)
    hf_to_megatron(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(hf, tmp_path / "back")
    others = {path.name for path in hf.iterdir() if path.suffix != ".safetensors"}
    assert "tokenizer.json" in others
    for name in others:
        assert (hf / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    metadata = json.loads((tmp_path / "megatron" / "metadata.json").read_text())
    assert metadata == {"format": "igpo-megatron", "version": 1, "model_type": CONFIGS[kind]["model_type"], "vocab_multiple": 128}
    result = verify(hf, tmp_path / "megatron")
    assert result.differences == {} and result.worst_difference == 0.0
    assert result.hf_sha256 == result.megatron_sha256
    assert result.num_tensors == len(HfReader(hf).names())


def test_transformers_loads_an_exported_folder_with_the_same_weights(tmp_path):
    from transformers import AutoModelForCausalLM

    hf = hf_folder(tmp_path / "hf", "qwen2_tied")
    hf_to_megatron(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=50_000)
    tokens = torch.arange(12)[None]
    before, after = (AutoModelForCausalLM.from_pretrained(folder)(tokens).logits for folder in (hf, tmp_path / "back"))
    assert torch.equal(before, after)


def test_shards_on_both_sides_hold_the_same_tensors(tmp_path):
    hf = hf_folder(tmp_path / "hf", "qwen3")
    hf_to_megatron(hf, tmp_path / "megatron", max_shard_bytes=40_000)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=40_000)
    assert len(list((tmp_path / "megatron" / "model").glob("*.distcp"))) > 2
    shards = sorted((tmp_path / "back").glob("model-*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert_same_bits(hf, tmp_path / "back")
    # Files that safetensors itself reads, with the sizes that the index promises.
    index = json.loads((tmp_path / "back" / HF_INDEX).read_text())
    loaded = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert set(loaded) == set(index["weight_map"])
    assert sum(tensor.nbytes for tensor in loaded.values()) == index["metadata"]["total_size"]


def test_a_dtype_asked_for_is_written_and_said_in_the_config(tmp_path):
    hf = hf_folder(tmp_path / "hf", "qwen2")
    hf_to_megatron(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", torch.bfloat16)
    a, b = HfReader(hf), HfReader(tmp_path / "back")
    assert torch.equal(a.get("model.norm.weight").bfloat16(), b.get("model.norm.weight"))
    assert read_shape(tmp_path / "back").dtype == "bfloat16"


def test_verify_names_the_tensor_that_is_off_the_most(tmp_path):
    hf = hf_folder(tmp_path / "hf", "qwen2")
    hf_to_megatron(hf, tmp_path / "megatron")
    tensors = load_file(hf / "model.safetensors")
    tensors["model.norm.weight"][0] += 0.25
    tensors["model.layers.1.self_attn.k_proj.bias"][3] -= 2.0
    save_file(tensors, hf / "model.safetensors")
    result = verify(hf, tmp_path / "megatron")
    assert set(result.differences) == {"model.norm.weight", "model.layers.1.self_attn.k_proj.bias"}
    assert result.worst == "model.layers.1.self_attn.k_proj.bias"
    assert result.worst_difference == pytest.approx(2.0, abs=1e-5)
    assert result.hf_sha256 != result.megatron_sha256
    shown = CliRunner().invoke(app, ["verify", "--hf", str(hf), "--megatron", str(tmp_path / "megatron")])
    assert shown.exit_code == 1 and "worst model.layers.1.self_attn.k_proj.bias" in shown.output


def test_a_tied_model_may_repeat_its_embedding_but_not_contradict_it(tmp_path):
    hf = hf_folder(tmp_path / "hf", "qwen2_tied")
    tensors = load_file(hf / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, hf / "model.safetensors")
    hf_to_megatron(hf, tmp_path / "megatron")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(ConversionError, match=r"tie_word_embeddings=true, but lm_head.weight differs"):
        hf_to_megatron(hf, tmp_path / "other")
    assert not (tmp_path / "other").exists()


# ---- bad input


def sharded(folder: Path) -> Path:
    hf = hf_folder(folder / "one", "qwen2")
    hf_to_megatron(hf, folder / "megatron")
    megatron_to_hf(folder / "megatron", folder / "hf", max_shard_bytes=60_000)
    return folder / "hf"


def test_a_missing_shard_is_named(tmp_path):
    hf = sharded(tmp_path)
    shard = min(hf.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(ConversionError, match=f"{shard.name} is missing"):
        HfReader(hf)


def test_a_truncated_shard_is_named(tmp_path):
    hf = sharded(tmp_path)
    shard = min(hf.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ConversionError, match=f"{shard.name} is not a complete safetensors file"):
        HfReader(hf)


def test_an_index_that_does_not_match_its_files_is_refused_with_the_names(tmp_path):
    hf = sharded(tmp_path)
    index = json.loads((hf / HF_INDEX).read_text())
    file = index["weight_map"].pop("model.norm.weight")
    index["weight_map"]["model.extra.weight"] = file
    (hf / HF_INDEX).write_text(json.dumps(index))
    with pytest.raises(ConversionError) as error:
        HfReader(hf)
    assert "model.extra.weight: not in" in str(error.value) and "model.norm.weight: in" in str(error.value)


@pytest.mark.parametrize(
    "content", [b"[]", b"\xff\xfe", b"{", *(b'{"weight_map": %s}' % held for held in (b"null", b"[]", b"{}", b'{"a": 3}'))]
)
def test_an_index_that_is_none_is_refused(tmp_path, content):
    (tmp_path / HF_INDEX).write_bytes(content)
    with pytest.raises(ConversionError, match=r"index\.json.*download it again"):
        HfReader(tmp_path)


@pytest.mark.parametrize("content, message", [(b"[]", "holds a list"), (b"null", "holds a NoneType"), (b"\xff", "is not JSON")])
def test_a_config_that_is_none_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConversionError, match=message):
        read_shape(tmp_path)


def test_a_tensor_that_no_rule_knows_stops_the_conversion_and_leaves_nothing(tmp_path):
    hf = hf_folder(tmp_path / "hf", "qwen2")
    tensors = load_file(hf / "model.safetensors")
    save_file({**tensors, "model.layers.0.adapter.weight": torch.ones(2)}, hf / "model.safetensors")
    with pytest.raises(ConversionError, match=r"model.layers.0.adapter.weight"):
        hf_to_megatron(hf, tmp_path / "megatron")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_damaged_megatron_checkpoint_is_named(tmp_path):
    hf_to_megatron(hf_folder(tmp_path / "hf", "qwen2"), tmp_path / "megatron")
    data = tmp_path / "megatron" / "model" / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[:-5000])
    with pytest.raises(ConversionError, match=r"__0_0.distcp has \d+ bytes, but the checkpoint's index expects"):
        MegatronReader(tmp_path / "megatron" / "model")
    data.unlink()
    with pytest.raises(ConversionError, match=r"__0_0.distcp is missing"):
        MegatronReader(tmp_path / "megatron" / "model")
    (tmp_path / "megatron" / "model" / ".metadata").write_bytes(b"\x80")
    with pytest.raises(ConversionError, match="is damaged"):
        MegatronReader(tmp_path / "megatron" / "model")


def test_a_checkpoint_of_another_architecture_than_its_config_is_refused(tmp_path):
    hf_to_megatron(hf_folder(tmp_path / "hf", "qwen2"), tmp_path / "megatron")
    config = tmp_path / "megatron" / "hf" / "config.json"
    config.write_text(config.read_text().replace('"qwen2"', '"qwen3"'))
    with pytest.raises(ConversionError, match=r"linear_qkv.bias: in the Megatron model, but no rule claims it"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConversionError("x"), 2), (PermissionError("x"), 1), (KeyboardInterrupt(), 130), (KeyboardInterrupt("SIGTERM"), 143)],
)
def test_the_exit_code_says_what_kind_of_end_a_conversion_had(error, code, monkeypatch):
    def end(*arguments, **options):
        raise error

    monkeypatch.setattr("checkpoint_conversion.inspection.inspect", end)
    shown = CliRunner().invoke(app, ["inspect", "."])
    assert shown.exit_code == code and len(shown.output.splitlines()) == 1


def test_who_reads_no_further_is_no_error_of_an_inspection(monkeypatch):
    def end(*arguments, **options):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("checkpoint_conversion.inspection.inspect", end)
    assert "error" not in CliRunner().invoke(app, ["inspect", "."]).output


def test_the_command_line_converts_both_ways_and_answers_mistakes_in_a_sentence(tmp_path):
    hf, megatron, back = hf_folder(tmp_path / "hf", "qwen3"), tmp_path / "megatron", tmp_path / "back"

    def run(*arguments: object):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    assert run("hf-to-megatron", "--hf", hf, "--out", megatron).exit_code == 0
    assert run("megatron-to-hf", "--megatron", megatron, "--out", back).exit_code == 0
    assert run("verify", "--hf", back, "--megatron", megatron).exit_code == 0
    assert_same_bits(hf, back)
    mistakes = [
        (("hf-to-megatron", "--hf", tmp_path / "nowhere", "--out", tmp_path / "x"), "nowhere does not exist"),
        (("hf-to-megatron", "--hf", hf, "--out", megatron), "megatron exists already"),
        (("megatron-to-hf", "--megatron", hf, "--out", tmp_path / "x"), "is not a checkpoint folder with model/"),
        (("megatron-to-hf", "--megatron", megatron / "model", "--out", tmp_path / "x"), f"give its parent {megatron}"),
        (("megatron-to-hf", "--megatron", megatron, "--out", tmp_path / "x", "--dtype", "fp8"), "use one of float32"),
        (("verify", "--hf", hf, "--megatron", tmp_path / "nowhere"), "nowhere does not exist"),
    ]
    for arguments, message in mistakes:
        result = run(*arguments)
        assert result.exit_code == 2 and message in result.output, (arguments, result.output)
    assert not (tmp_path / "x").exists()
    shutil.rmtree(hf)
    (tmp_path / "hf").mkdir()
    assert "holds no config.json" in run("hf-to-megatron", "--hf", hf, "--out", tmp_path / "x").output
    (hf / "config.json").write_text("{")
    assert "is not JSON" in run("hf-to-megatron", "--hf", hf, "--out", tmp_path / "x").output
