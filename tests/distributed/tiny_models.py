"""A small random model of every supported family, as transformers saves it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = ("qwen2", "qwen2_tied", "qwen3", "llama3", "llama", "mistral", "qwen3_moe", "qwen3_moe_unscaled", "mixtral")
MIXTURES = ("qwen3_moe", "qwen3_moe_unscaled", "mixtral")
VOCAB = 150  # not a multiple of anything the padding uses


def make_hf_folder(folder: Path, name: str, layers: int = 2, hidden: int = 64) -> Path:
    """A small random model as transformers saves it; every bias and norm is random, so that none can be forgotten unseen."""
    from transformers import (
        AutoModelForCausalLM,
        LlamaConfig,
        MistralConfig,
        MixtralConfig,
        Qwen2Config,
        Qwen3Config,
        Qwen3MoeConfig,
    )

    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": name.endswith("tied"),
        "dtype": "float32",
    }
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    scaled = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    experts = {"num_experts_per_tok": 2, "rope_parameters": plain}
    qwen3_moe = partial(Qwen3MoeConfig, **common, **experts, head_dim=32, num_experts=4, moe_intermediate_size=48)
    config = {
        "qwen2": lambda: Qwen2Config(**common, rope_parameters=plain),
        "qwen2_tied": lambda: Qwen2Config(**common, rope_parameters=plain),
        "qwen3": lambda: Qwen3Config(**common, head_dim=32, rope_parameters=plain),
        "llama3": lambda: LlamaConfig(**common, head_dim=hidden // 4, rope_parameters=scaled),
        "llama": lambda: LlamaConfig(**common, rope_parameters=plain),
        "mistral": lambda: MistralConfig(**common, head_dim=32, sliding_window=None, rope_parameters=plain),
        "qwen3_moe": lambda: qwen3_moe(norm_topk_prob=True),
        "qwen3_moe_unscaled": lambda: qwen3_moe(norm_topk_prob=False),
        "mixtral": lambda: MixtralConfig(**common, **experts, num_local_experts=4),
    }[name]()
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder
