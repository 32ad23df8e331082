"""Try a user's own loss on four tokens of two trajectories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from igpo_megatron.algorithms.losses.base import HookedLoss
from igpo_megatron.algorithms.losses.tokens import Tokens
from igpo_megatron.types import EntropyStats, StepCounts


def tiny_tokens() -> Tokens:
    """Everything that a loss may be given, in fp32; the first two tokens have a positive advantage, the others a negative one."""
    old = torch.tensor([-1.0, -2.0, -0.5, -1.5])
    return Tokens(
        logprobs=(old + torch.tensor([0.1, -0.1, 0.2, -0.2])).requires_grad_(),
        weight=torch.tensor([0.5, 0.5, 0.5, 0.5]),
        advantages=torch.tensor([[0.5, 0.0], [0.5, 0.0], [0.0, 0.5], [0.0, 0.5]]),
        old_logprobs=old,
        behavior_logprobs=old + 0.01,
        ref_logprobs=old - 0.1,
        entropy=torch.tensor([0.5, 1.0, 1.5, 2.0], requires_grad=True),
        old_entropies=torch.tensor([0.6, 0.9, 1.6, 1.9]),
        sequence=torch.tensor([0, 0, 1, 1]),
        sequences=2,
    )


def result_on_tiny_tokens(function: Callable[..., Any], config: HookedLoss) -> str | None:
    """What is wrong with a loss's result, as the end of a sentence; None if nothing is."""
    stats = EntropyStats(1.25, 0.6, threshold=1.6, lowest=0.6, highest=1.9) if config.old_entropies else None
    tokens = tiny_tokens()
    found = function(tokens, StepCounts(4, 2, stats), config)
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], dict):
        return f"returned a {type(found).__name__}; expected a pair: the sum over tokens, and a dict of metrics per token"
    total, metrics = found
    if not isinstance(total, torch.Tensor) or total.ndim or not total.isfinite():
        return f"returned {total!r} as its sum over tokens; expected a tensor of one finite number"
    if not total.requires_grad:
        return "returned a sum without a gradient; expected one that depends on tokens.logprobs, which are being detached somewhere"
    (gradient,) = torch.autograd.grad(total, tokens.logprobs, allow_unused=True)
    if gradient is None or not gradient.isfinite().all():
        return f"has the gradient {gradient} for four tokens.logprobs; expected finite numbers"
    for name, values in metrics.items():
        if not isinstance(values, torch.Tensor) or values.shape != tokens.logprobs.shape or values.requires_grad:
            shown = f"{tuple(values.shape)}, requires_grad={values.requires_grad}" if isinstance(values, torch.Tensor) else repr(values)
            return f"returned {shown} as its metric {name!r}; expected one number per token without a gradient: (4,)"
    return None
