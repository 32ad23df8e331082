"""Names of a model of TransformerEngine layers, as Megatron-Core 0.16.1 builds it, go through the same table. No TransformerEngine here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_conversion import CONFIGS, SMALL, assert_same_bits, hf_folder

from checkpoint_conversion.architectures import check_total, local_name, rules_for, shape_of
from checkpoint_conversion.classic_folder import Grid
from checkpoint_conversion.convert import hf_to_megatron, megatron_to_hf
from checkpoint_conversion.rules import ConversionError

EXPERTS = 4
EXTRA = ("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention")


def te_layer(kind: str) -> Iterator[str]:
    """Parameters of one layer, its norms fused into the matmuls behind them, except that in front of experts."""
    yield from ("self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight")
    if kind.startswith("qwen2"):
        yield "self_attention.linear_qkv.bias"
    if kind.startswith("qwen3"):
        yield from ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")
    if kind in ("qwen3_moe", "mixtral"):
        yield from ("pre_mlp_layernorm.weight", "mlp.router.weight")
        yield from (f"mlp.experts.linear_fc{number}.weight{expert}" for number in (1, 2) for expert in range(EXPERTS))
    else:
        yield from ("mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight")


def te_model(kind: str) -> list[str]:
    outside = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight"]
    if kind != "qwen2_tied":
        outside.append("output_layer.weight")
    return [*outside, *(f"decoder.layers.{layer}.{name}" for layer in range(SMALL["num_hidden_layers"]) for name in te_layer(kind))]


def extra_states(kind: str) -> list[str]:
    modules = [*EXTRA, *((f"mlp.experts.linear_fc{n}" if kind in ("qwen3_moe", "mixtral") else f"mlp.linear_fc{n}") for n in (1, 2))]
    return [f"decoder.layers.{layer}.{name}._extra_state" for layer in range(SMALL["num_hidden_layers"]) for name in modules]


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_of_transformer_engines_layers_has_one_rule_and_every_rule_a_parameter(kind: str) -> None:
    rules = rules_for(shape_of({**SMALL, **CONFIGS[kind]}), 128)
    names = te_model(kind)
    check_total(rules, megatron_names=[*names, *extra_states(kind)])
    assert {rule.te_name for rule in rules.values() if rule.exports} == set(names)
    assert all(rules[local_name(name)].te_name == name for name in names)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_missing_a_foreign_and_a_doubled_parameter_are_listed(kind: str) -> None:
    rules = rules_for(shape_of({**SMALL, **CONFIGS[kind]}), 128)
    norm, other = "self_attention.linear_qkv.layer_norm_weight", "decoder.layers.1.self_attention.linear_qkv.layer_norm_bias"
    names = [name for name in te_model(kind) if name != f"decoder.layers.0.{norm}"]
    with pytest.raises(ConversionError) as error:
        check_total(rules, megatron_names=[*names, other, "decoder.layers.1.input_layernorm.weight"])
    message = str(error.value)
    assert "(3 tensors)" in message
    assert "decoder.layers.0.input_layernorm.weight: expected by the table, but not in the Megatron model" in message
    assert f"{other}: in the Megatron model, but no rule claims it" in message
    assert "decoder.layers.1.input_layernorm.weight: 2 times in the Megatron model" in message


@pytest.mark.parametrize("kind", ["qwen2_tied", "qwen3", "qwen3_moe"])
def test_files_per_rank_of_transformer_engine_layers_come_back_bit_equal_beside_their_extra_states(tmp_path: Path, kind: str) -> None:
    hf = hf_folder(tmp_path / "hf", kind)
    hf_to_megatron(hf, tmp_path / "megatron", classic=Grid(1, 1, 1), te_names=True)
    (file,) = (tmp_path / "megatron").rglob("model_optim_rng.pt")
    state = torch.load(file, weights_only=False)
    assert set(state["model"]) == set(te_model(kind))
    state["model"] |= dict.fromkeys(extra_states(kind), torch.zeros(3, dtype=torch.uint8))
    torch.save(state, file)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(hf, tmp_path / "back")
