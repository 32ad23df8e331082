"""Claim: log-probs are as exact as fp32 logits allow; rounding logits to 16 bits moves IGPO's rewards by as much as a turn is worth.

    python tools/bench/head_precision.py     seconds on two cores

Inputs in bf16 with the spread of a small Qwen2.5's logits (|z| up to about 28). Every provider gets the same inputs; the truth is fp64.
The second figure is the error of the mean over an 8-token answer, whose exponential's difference is what IGPO rewards.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import finish
from heads import LogProbs, exact, ours

from igpo_megatron.kernels.linear_logprob import FORMS

ROWS, HIDDEN, VOCAB = 64, 896, 30000
ANSWER = 8
LARGEST_LOGIT = 28.0


def main(out: Annotated[Path | None, typer.Option(help="Result file; default: results/DEVICE/head_precision.json.")] = None) -> None:
    """Compare with fp64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, weight, targets = (tensor.to(device) for tensor in inputs())
    true = exact(hidden, weight, targets)
    errors = {name: error(provider(hidden, weight, targets), true) for name, provider in providers(device).items()}
    figures = {"rows": ROWS, "hidden": HIDDEN, "vocab": VOCAB, "errors": errors, **{f"ours_{k}": v for k, v in errors["ours"].items()}}
    floors = {"fp32_spacing_at_largest_logit": 2.0 ** (4 - 23), "note": "one logit near 28 is rounded by up to half of this spacing"}
    finish("head_precision", figures, floors, ("torch", "triton"), out)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [N, H] and weight [V, H] bf16, targets [N]: half of them likely tokens, half of them any."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator) / HIDDEN**0.5
    hidden *= LARGEST_LOGIT / (hidden @ weight.t()).abs().max()
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    targets[::2] = (hidden @ weight.t()).argmax(-1)[::2]
    return hidden.bfloat16(), weight.bfloat16(), targets


def providers(device: str) -> dict[str, LogProbs]:
    """What published heads do to logits on their way to log-probs, and ours."""

    def rounded(dtype: torch.dtype, softmax: torch.dtype) -> LogProbs:
        def logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            logits = (hidden.float() @ weight.float().t()).to(dtype).to(softmax)
            return torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]

        return logprobs

    return {
        "ours": partial(ours, "torch", "auto"),
        "fp16_logits": rounded(torch.float16, torch.float32),
        "bf16_logits": rounded(torch.bfloat16, torch.float32),
        "bf16_log_softmax": rounded(torch.bfloat16, torch.bfloat16),
        **{f"ours_{form}": partial(ours, "triton", form) for form in FORMS if device == "cuda"},
    }


def error(found: torch.Tensor, true: torch.Tensor) -> dict[str, float]:
    """Largest error of a log-prob, and of the mean over an answer. [nats]"""
    wrong = found.double() - true
    return {"max_abs": float(wrong.abs().max()), "max_abs_answer_mean": float(wrong.view(-1, ANSWER).mean(1).abs().max())}


if __name__ == "__main__":
    typer.run(main)
