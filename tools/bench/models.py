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

POLICY = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "policy"
CONTEXT = 32768


def size_of(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict[str, int | bool]:
    """The part of config.json that decides size and time."""
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "demo": size_of(128, 384, 4, 4, 4, 656, tied=True),
    "0.5B": size_of(896, 4864, 24, 14, 2, 151936, tied=True),
    "1.5B": size_of(1536, 8960, 28, 12, 2, 151936, tied=True),
    "7B": size_of(3584, 18944, 28, 28, 4, 152064, tied=False),
}
"""Qwen2.5's, and the demo's."""


def hf_config(shape: str, layers: int | None = None) -> dict[str, Any]:
    """config.json of a shape, as far as it decides size and time; `layers`: instead of the shape's own."""
    return qwen2({**SHAPES[shape], **({} if layers is None else {"num_hidden_layers": layers})}, CONTEXT)


def qwen2(size: Mapping[str, int | bool], context: int) -> dict[str, Any]:
    """config.json of a Qwen2 of that size."""
    return {"model_type": "qwen2", **size, "max_position_embeddings": context, "rms_norm_eps": 1e-6, "rope_theta": 1e6}


def save_random(config: Mapping[str, Any], folder: Path | str, **more: Any) -> None:
    """A Hugging Face folder, without a tokenizer, of random weights for a config.json; `more` of its settings."""
    torch.manual_seed(0)
    described = Qwen2Config(**{key: value for key, value in config.items() if key != "model_type"}, **more)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(described).to(more.get("dtype", torch.float32))
    model.save_pretrained(folder)


def config_for(folder: Path | str, *, dtype: str | None = None, model: Mapping[str, Any] | None = None, **sections: Any) -> Config:
    """A run's configuration on this device, in bf16 on a GPU unless `dtype` says otherwise; `sections` of it, `model` beside its path."""
    cuda = torch.cuda.is_available()
    described = {"path": str(folder), "dtype": dtype or ("bf16" if cuda else "fp32"), **(model or {})}
    return build({"model": described, "run": {"device": "cuda" if cuda else "cpu"}, **sections})


@contextmanager
def random_policy(shape: str, layers: int | None = None) -> Iterator[Path]:
    """A Hugging Face folder of that shape (with the demo's tokenizer), gone when the block ends."""
    dtype = torch.float32 if shape == "demo" else torch.bfloat16
    with TemporaryDirectory(prefix="igpo-bench-") as folder:
        save_random(hf_config(shape, layers), folder, eos_token_id=2, dtype=dtype)
        AutoTokenizer.from_pretrained(POLICY).save_pretrained(folder)
        yield Path(folder)
