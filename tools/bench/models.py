"""Policies with random weights in the shapes that benchmarks quote: what they cost does not depend on what they know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from igpo_megatron.config.load import build
from igpo_megatron.config.schema import Config
from igpo_megatron.plan.model_shape import KNOWN

POLICY = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "policy"
CONTEXT = 32768


def qwen2(
    hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, *, tied: bool, context: int = CONTEXT
) -> dict[str, Any]:
    """config.json of a Qwen2 of that size."""
    return {
        "model_type": "qwen2",
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": context,
    }


SHAPES = {"demo": qwen2(128, 384, 4, 4, 4, 656, tied=True), **{size: KNOWN[f"Qwen2.5-{size}"] for size in ("0.5B", "1.5B", "7B")}}
"""config.json of the demo's policy and of Qwen2.5's sizes, as far as it decides size and time."""


def hf_config(shape: str, layers: int | None = None) -> dict[str, Any]:
    """config.json of a shape; `layers`: instead of its own."""
    return SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})


def random_model(config: Mapping[str, Any], device: str, **more: Any) -> Qwen2ForCausalLM:
    """A model of a config.json, of `more` settings such as its dtype; on the device "meta" it has shapes alone."""
    torch.manual_seed(0)
    described = Qwen2Config(**{key: value for key, value in config.items() if key not in ("model_type", "torch_dtype", "dtype")}, **more)
    with torch.device(device):
        return Qwen2ForCausalLM(described).to(more.get("dtype", torch.float32))


def save_random(config: Mapping[str, Any], folder: Path | str, **more: Any) -> None:
    """A Hugging Face folder, without a tokenizer, of random weights for a config.json; `more` of its settings."""
    random_model(config, "cuda" if torch.cuda.is_available() else "cpu", **more).save_pretrained(folder)


def config_for(folder: Path | str, *, dtype: str | None = None, model: Mapping[str, Any] | None = None, **sections: Any) -> Config:
    """A run's configuration on this device, in bf16 on a GPU unless `dtype` says otherwise; `sections` of it, `model` beside its path."""
    cuda = torch.cuda.is_available()
    described = {"path": str(folder), "dtype": dtype or ("bf16" if cuda else "fp32"), **(model or {})}
    return build({"model": described, "run": {"device": "cuda" if cuda else "cpu", "threads": 1}, **sections})


@contextmanager
def random_policy(shape: str, layers: int | None = None) -> Iterator[Path]:
    """A Hugging Face folder of that shape (with the demo's tokenizer), gone when the block ends."""
    dtype = torch.float32 if shape == "demo" else torch.bfloat16
    with TemporaryDirectory(prefix="igpo-bench-") as folder:
        save_random(hf_config(shape, layers), folder, eos_token_id=2, dtype=dtype)
        AutoTokenizer.from_pretrained(POLICY).save_pretrained(folder)
        yield Path(folder)
