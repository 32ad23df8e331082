"""A mixture of experts in a real vLLM engine: an exported folder loads as in transformers, and new experts really serve."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from checkpoint_conversion.convert import hf_to_megatron, megatron_to_hf
from checkpoint_conversion.hf_folder import HfReader
from igpo_megatron.config.load import build
from igpo_megatron.engines.pool import EnginePool
from igpo_megatron.types import SamplingRequest

POLICY = Path(__file__).parents[2] / "examples/quickstart/policy"
TOKENS = torch.randint(0, 600, (49,), generator=torch.Generator().manual_seed(0)).tolist()
NEW_TOKENS = 12


def save_model(folder: Path, expert_scale: float) -> Path:
    """The same random model, its experts scaled."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=656,
        hidden_size=128,
        intermediate_size=96,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        eos_token_id=2,
        dtype="float32",
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1).mul_(expert_scale if ".experts." in name else 1.0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(POLICY).save_pretrained(folder)
    return folder


def transformers_says(folder: Path) -> tuple[torch.Tensor, list[int]]:
    """(log-probs of TOKENS but the first, greedy continuation)"""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(torch.tensor([TOKENS])).logits[0, :-1].detach()
    logprobs = torch.log_softmax(logits, -1).gather(-1, torch.tensor(TOKENS[1:])[:, None])[:, 0]
    greedy = model.generate(torch.tensor([TOKENS]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    return logprobs, greedy[0, len(TOKENS) :].tolist()


def test_an_exported_folder_and_new_experts_serve_what_transformers_says(tmp_path: Path) -> None:
    first, second = save_model(tmp_path / "first", 1.0), save_model(tmp_path / "second", -0.7)
    hf_to_megatron(first, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "exported")
    expected = {folder: transformers_says(folder) for folder in (first, second)}
    assert (expected[first][0] - expected[second][0]).abs().max() > 0.5, "an engine that keeps old experts must show"
    config = build(
        {
            "model": {"path": str(tmp_path / "exported"), "dtype": "fp32"},
            "run": {"device": "cpu"},
            "rollout": {"max_context": 512, "engine": {"kv_cache_mib": 64}},
        }
    )
    with EnginePool(config) as pool:

        def assert_serves(folder: Path) -> None:
            served = torch.tensor(pool.score_on_each(TOKENS)[0][1:])
            assert (served - expected[folder][0]).abs().max() < 2e-5
            turn = asyncio.run(pool.generate(SamplingRequest(TOKENS, max_tokens=NEW_TOKENS, temperature=0.0, seed=0, key="k")))
            assert turn.token_ids == expected[folder][1][: len(turn.token_ids)] and turn.token_ids

        assert_serves(first)
        for version, folder in enumerate((second, first, second), start=1):
            reader = HfReader(folder)
            pool.update_weights(((name, reader.get(name)) for name in reader.names()), version)
            assert_serves(folder)
