"""The one place where a model folder's tokenizer is read for training and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from igpo_megatron.types import UserError


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a model folder. Raises UserError where its files are absent or damaged."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # (a damaged tokenizer.json is a bare Exception of the Rust side)
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: its tokenizer cannot be read ({said}); fetch tokenizer.json and tokenizer_config.json again") from error
