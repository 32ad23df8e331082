"""Policies with random weights in the shapes that benchmarks quote: what they cost does not depend on what they know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

POLICY = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "policy"
CONTEXT = 32768


def _shape(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict[str, int | bool]:
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
    "demo": _shape(128, 384, 4, 4, 4, 656, tied=True),
    "0.5B": _shape(896, 4864, 24, 14, 2, 151936, tied=True),
    "1.5B": _shape(1536, 8960, 28, 12, 2, 151936, tied=True),
    "7B": _shape(3584, 18944, 28, 28, 4, 152064, tied=False),
}
"""Qwen2.5's, and the demo's."""


def hf_config(shape: str, layers: int | None = None) -> dict[str, Any]:
    """config.json of a shape, as far as it decides size and time; `layers`: instead of the shape's own."""
    more = {} if layers is None else {"num_hidden_layers": layers}
    return {"model_type": "qwen2", **SHAPES[shape], **more, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-6, "rope_theta": 1e6}


@contextmanager
def random_policy(shape: str, layers: int | None = None) -> Iterator[Path]:
    """A Hugging Face folder of that shape (with the demo's tokenizer), gone when the block ends."""
    dtype = torch.float32 if shape == "demo" else torch.bfloat16
    with TemporaryDirectory(prefix="igpo-bench-") as folder:
        torch.manual_seed(0)
        values = {key: value for key, value in hf_config(shape, layers).items() if key != "model_type"}
        config = Qwen2Config(**values, eos_token_id=2, dtype=dtype)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = Qwen2ForCausalLM(config).to(dtype)
        model.save_pretrained(folder)
        del model  # else the device held it until the block ends, in every figure of memory
        AutoTokenizer.from_pretrained(POLICY).save_pretrained(folder)
        yield Path(folder)
