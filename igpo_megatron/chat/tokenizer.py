"""Reads a model folder's tokenizer and the size of its embedding, for training and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from igpo_megatron.types import UserError


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a model folder. Raises UserError if its files are missing or damaged."""
    if not folder.is_dir():
        raise UserError(f"model.path={folder}: no such folder; name a model's folder")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise UserError(f"model.path={folder}: no tokenizer.json or tokenizer_config.json in it; name a model's folder")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # (for a damaged tokenizer.json the Rust library raises a bare Exception)
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: its tokenizer cannot be read ({said}); fetch tokenizer.json and tokenizer_config.json again") from error


def embedding_rows(folder: Path) -> int:
    """Rows of the model's embedding; there may be more rows than tokens."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(folder).get_text_config().vocab_size)
