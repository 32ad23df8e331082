"""Whether a Megatron folder holds the model of a Hugging Face folder: the log-probs of one text by transformers and by our model.

    text --tokenizer--> tokens ──transformers(hf)──────────> log-probs ─┐
                               └─PolicyModel(megatron)────> log-probs ─┴─> LogProbGap

Bit-equal tensors (`checkpoint_conversion.convert.verify`) prove the files; this proves that both sides compute the same with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import typer

from checkpoint_conversion import commands, convert
from checkpoint_conversion.architectures import read_shape
from igpo_megatron.config.load import build

TEXT = (
    "The capital of Australia is not Sydney, its largest city, but Canberra, which was founded in 1913 and planned by Walter Burley "
    "Griffin. 17 * 23 = 391; def square(x): return x * x. Où est la bibliothèque? 北京是中国的首都。"
)
"""Several kinds of text in few tokens."""

MAX_GAP = 1e-3
"""Largest difference of a log-prob by two fp32 implementations: small models reach 1e-5, deep ones a few 1e-4; a wrong tensor, units."""


@dataclass(frozen=True, slots=True)
class LogProbGap:
    """Differences of the log-probs of one text."""

    num_tokens: int
    worst: float
    """max |transformers - Megatron|; nan where a side is not a number."""

    position: int
    """Of the token with it."""

    mean: float

    @property
    def agrees(self) -> bool:
        return self.worst <= MAX_GAP


def compare(expected: torch.Tensor, found: torch.Tensor) -> LogProbGap:
    """The gap between two [N] log-probs."""
    gaps = (expected - found).abs()
    position = int(torch.where(gaps.isnan(), torch.inf, gaps).argmax())
    return LogProbGap(len(gaps), float(gaps[position]), position, float(gaps.mean()))


def text_tokens(folder: Path) -> list[int]:
    """`TEXT` by the folder's tokenizer; random tokens if it has none."""
    shape = read_shape(folder)
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        from igpo_megatron.chat.tokenizer import load_tokenizer

        tokens: list[int] = load_tokenizer(folder)(TEXT)["input_ids"]
    else:
        tokens = torch.randint(0, shape.vocab_size, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    return tokens[: shape.max_positions]


@torch.no_grad()
def transformers_log_probs(folder: Path, tokens: list[int]) -> torch.Tensor:
    """log p(token t | tokens before t) for every token but the first. [len(tokens) - 1]"""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    logits = torch.log_softmax(model(torch.tensor([tokens])).logits[0, :-1].float(), -1)
    return logits.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]


def megatron_log_probs(hf: Path, megatron: Path, tokens: list[int]) -> torch.Tensor:
    """The same by our Megatron model with the weights of a Megatron folder, torch_dist or classic."""
    from igpo_megatron.policy import parallel

    config = build({"model": {"path": str(hf), "dtype": "fp32", "backend": "local"}, "run": {"device": "cpu"}})
    ranks = parallel.init(config)
    try:
        from igpo_megatron.packing.tree import pack_for_scoring
        from igpo_megatron.policy import schedule
        from igpo_megatron.policy.model import build_model, fill_weights
        from igpo_megatron.policy.weight_sync import scoring_group

        rules, reader = convert.open_megatron(megatron, hf)
        (model,) = build_model(read_shape(hf), config, ranks.device)
        # Through the HF tensors, whose vocabulary is unpadded: checkpoint and model may be padded differently.
        fill_weights([model], rules, lambda rule: rule.to_megatron(rule.to_hf(reader.get(rule.megatron_name))))
        rows = pack_for_scoring([scoring_group(tokens)], row_tokens=len(tokens), multiple=1)
        (found,) = schedule.forward_only([model], rows, temperature=1.0, device=ranks.device)
        return found
    finally:
        parallel.shutdown()


def main(hf: Path, megatron: Path, log_probs: bool) -> int:
    """Print what differs; 0 where files and, if asked for, log-probs agree, else 1."""
    same_files = commands.report_verification(hf, megatron)
    same_model = not log_probs or _report_gap(hf, megatron)
    return int(not (same_files and same_model))


def _report_gap(hf: Path, megatron: Path) -> bool:
    """Score `TEXT` by both, in fp32 on the CPU, one after the other. Opens and closes a process group of one rank."""
    tokens = text_tokens(hf)
    expected = transformers_log_probs(hf, tokens)
    gap = compare(expected, megatron_log_probs(hf, megatron, tokens))
    verdict = "agree" if gap.agrees else f"DIFFER by more than {MAX_GAP:g}: one side's weights or config are not the other's"
    typer.echo(
        f"log-probs of {gap.num_tokens} tokens by transformers and Megatron {verdict}; "
        f"largest gap {gap.worst:.3g} at token {gap.position}, mean {gap.mean:.3g}"
    )
    return gap.agrees
