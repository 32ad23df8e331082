"""Models by name: what their published config.json says of their shape. A folder's own config.json comes first."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from checkpoint_conversion.architectures import ModelShape, read_shape, shape_of
from igpo_megatron.types import UserError


def _config(family: str, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16",
        **more,
    }


_QWEN3: dict[str, Any] = {"head_dim": 128, "max_position_embeddings": 40960}
_EXPERTS: dict[str, Any] = {**_QWEN3, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA: dict[str, Any] = {"rope_theta": 500000.0, "rope_scaling": _LLAMA3, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}

KNOWN: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": _config("qwen2", 896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True),
    "Qwen2.5-1.5B": _config("qwen2", 1536, 8960, 28, 12, 2, 151936, tie_word_embeddings=True),
    "Qwen2.5-3B": _config("qwen2", 2048, 11008, 36, 16, 2, 151936, tie_word_embeddings=True),
    "Qwen2.5-7B": _config("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "Qwen2.5-14B": _config("qwen2", 5120, 13824, 48, 40, 8, 152064),
    "Qwen2.5-32B": _config("qwen2", 5120, 27648, 64, 40, 8, 152064),
    "Qwen2.5-72B": _config("qwen2", 8192, 29568, 80, 64, 8, 152064),
    "Qwen3-8B": _config("qwen3", 4096, 12288, 36, 32, 8, 151936, **_QWEN3),
    "Qwen3-14B": _config("qwen3", 5120, 17408, 40, 40, 8, 151936, **_QWEN3),
    "Qwen3-32B": _config("qwen3", 5120, 25600, 64, 64, 8, 151936, **_QWEN3),
    "Qwen3-30B-A3B": _config("qwen3_moe", 2048, 6144, 48, 32, 4, 151936, moe_intermediate_size=768, **_EXPERTS),
    "Qwen3-235B-A22B": _config("qwen3_moe", 4096, 12288, 94, 64, 4, 151936, moe_intermediate_size=1536, **_EXPERTS),
    "Llama-3.1-8B": _config("llama", 4096, 14336, 32, 32, 8, 128256, **_LLAMA),
    "Llama-3.1-70B": _config("llama", 8192, 28672, 80, 64, 8, 128256, **_LLAMA),
    "Mistral-7B-v0.3": _config("mistral", 4096, 14336, 32, 32, 8, 32768, sliding_window=None),
    "Mixtral-8x7B": _config("mixtral", 4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2),
}
"""Name -> the part of config.json that decides size and time. Instruct and Base models of a size have the same."""


def find_shape(model: str) -> tuple[str, ModelShape]:
    """(name, shape) of a folder with config.json, or of a known name in any spelling of case, with or without -Instruct or -Base.

    Raises UserError with the nearest names; ConversionError (a ValueError) for a folder that cannot be read.
    """
    if Path(model).is_dir():
        return Path(model).resolve().name, read_shape(model)
    names = {_plain(name): name for name in KNOWN}
    wanted = _plain(Path(model).name)
    if wanted not in names:
        near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(names[name] for name in near)}?" if near else f"known names: {', '.join(KNOWN)}"
        raise UserError(f"--model {model}: neither a folder nor a known name; {hint}")
    name = names[wanted]
    return name, shape_of(KNOWN[name], where=name)


def _plain(name: str) -> str:
    lowered = name.lower()
    for end in ("-instruct-v0.1", "-instruct", "-base", "-v0.1"):
        lowered = lowered.removesuffix(end)
    return lowered.replace("_", "-")
