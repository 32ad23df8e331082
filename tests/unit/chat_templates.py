"""Tokenizers with the essence of well-known models' chat templates, on the demo policy's vocabulary."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

POLICY = Path(__file__).parents[2] / "examples/quickstart/policy"
FOLDER = Path(__file__).parents[1] / "fixtures/templates"

TOKENS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "qwen2.5": ("<|endoftext|>", "<|im_end|>", ()),
    "qwen3": ("<|endoftext|>", "<|im_end|>", ()),
    "qwen3_thinking": ("<|endoftext|>", "<|im_end|>", ()),
    "llama3.1": ("<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>")),
    "mistral": ("<s>", "</s>", ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")),
    "gemma": ("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "smollm2": ("<|im_start|>", "<|im_end|>", ()),
    "r1_distill": ("<|begin_of_sentence|>", "<|end_of_sentence|>", ("<|User|>", "<|Assistant|>")),
    "base_chatml": ("<|endoftext|>", "<|endoftext|>", ()),
}
"""Template -> bos, eos and further special tokens of its tokenizer."""

ENDS = {**{name: eos for name, (_, eos, _) in TOKENS.items()}, "gemma": "<end_of_turn>", "base_chatml": "<|im_end|>"}
"""Template -> the token that it writes behind an assistant's message."""


def with_template(source: str) -> PreTrainedTokenizerFast:
    """The demo's tokenizer with another template."""
    loaded = AutoTokenizer.from_pretrained(POLICY)
    loaded.name_or_path = ""  # its files say nothing of another model's ends
    loaded.chat_template = source
    return loaded


@cache
def family(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of `name`, shared: do not change it."""
    loaded = with_template((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))
    bos, eos, more = TOKENS[name]
    loaded.add_tokens([bos, eos, *more], special_tokens=True)
    loaded.bos_token, loaded.eos_token = bos, eos
    return loaded
