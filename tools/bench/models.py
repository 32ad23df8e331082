"""Policies with random weights in the shapes that benchmarks quote: what they cost does not depend on what they know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

POLICY = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "policy"
CONTEXT = 32768

SHAPES: dict[str, dict[str, int | bool]] = {
    "demo": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 656, "tie_word_embeddings": True},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip
"""Qwen2.5's, and the demo's."""


@contextmanager
def random_policy(shape: str) -> Iterator[Path]:
    """A Hugging Face folder of that shape (with the demo's tokenizer), gone when the block ends."""
    dtype = torch.float32 if shape == "demo" else torch.bfloat16
    with TemporaryDirectory(prefix="igpo-bench-") as folder:
        torch.manual_seed(0)
        config = Qwen2Config(**SHAPES[shape], max_position_embeddings=CONTEXT, eos_token_id=2, dtype=dtype)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = Qwen2ForCausalLM(config).to(dtype)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(POLICY).save_pretrained(folder)
        yield Path(folder)
