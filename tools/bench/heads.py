"""The log-prob heads that head_kernel and head_memory compare: ours in every form, and the peers that load on this machine.

Every head maps hidden [N, H], weight [V, H], targets [N] to the log-probs [N]; `entropy` says whether it computes that as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from igpo_megatron.kernels.linear_logprob import FORMS, WORKSPACE, Form, Implementation, linear_logprob
from igpo_megatron.kernels.token_loss import linear_logprob_with_gradients

LogProbs = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Carrier = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
TEMPERATURE = 1.0
COMPILED_ROWS = 1024
WIDE_ROWS = 1024
"""Of a block of the second head that forms gradients forward; the first has blocks of the default workspace."""


@dataclass(frozen=True, slots=True)
class Head:
    """One way to compute log-probs."""

    logprobs: LogProbs
    differentiable: bool = True
    """False for a scalar-loss head whose gradient cannot be weighted token by token."""

    carrier: Carrier | None = None
    """Of a head that forms gradients in its forward pass: something to call backward on."""

    @property
    def matmuls(self) -> int:
        """Of 2NHV operations each in forward + backward: a head that keeps no logits computes them again."""
        return 4 if self.carrier is None else 3

    def train(self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor) -> None:
        """Forward + backward of the log-probs' sum, each times its own number of `upstream` [N]."""
        if self.carrier is None:
            (self.logprobs(hidden, weight, targets) * upstream).sum().backward()
        else:
            self.carrier(hidden, weight, targets, upstream).backward()


def load_heads(cuda: bool) -> tuple[dict[str, Head], dict[str, str]]:
    """(heads by name, why the others did not load)."""
    heads = {"eager": Head(_eager), "compiled_chunks": Head(_compiled_chunks)}
    missing: dict[str, str] = {}
    if cuda:
        heads |= {f"ours_{form}": Head(partial(ours, "triton", form)) for form in FORMS}
        heads |= {"ours_in_forward": _in_forward("triton", None), "ours_in_forward_wide": _in_forward("triton", WIDE_ROWS)}
        for name, load in (("fixed_split", _fixed_split), ("cce", _cce), ("liger", _liger), ("liger_cute", _liger_cute)):
            try:
                heads[name] = load()
            except Exception as error:  # noqa: BLE001  a peer may fail to load in any way; the benchmark goes on without it and says why
                missing[name] = f"{type(error).__name__}: {error}"[:200]
    else:
        heads["ours_torch"] = Head(partial(ours, "torch", "auto"))
        heads["ours_in_forward"] = _in_forward("torch", None)
        missing = dict.fromkeys((*(f"ours_{form}" for form in FORMS), "fixed_split", "cce", "liger", "liger_cute"), "needs a GPU")
    return heads, missing


def ours(implementation: Implementation, form: Form, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Our head's log-probs in one of its forms."""
    how: dict[str, Any] = {"temperature": TEMPERATURE, "need_entropy": False, "implementation": implementation, "form": form}
    return linear_logprob(hidden, weight, targets, **how)[0]


def exact(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The log-probs in fp64."""
    return torch.log_softmax(hidden.double() @ weight.double().t(), -1).gather(-1, targets[:, None])[:, 0]


def _in_forward(implementation: Implementation, rows: int | None) -> Head:
    """Blocks of `rows` rows, or of the default workspace."""

    def run(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
        none = torch.zeros_like(upstream)
        return linear_logprob_with_gradients(
            hidden,
            weight,
            targets,
            lambda block, logp, entropy: (upstream[block], none[block]),
            temperature=TEMPERATURE,
            need_entropy=False,
            implementation=implementation,
            workspace=WORKSPACE if rows is None else 4 * rows * len(weight),
        )

    def logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return run(hidden, weight, targets, torch.zeros(len(targets), device=hidden.device))[0]

    return Head(logprobs, carrier=lambda *inputs: run(*inputs)[-1])


def _eager(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy((hidden @ weight.t()).float() / TEMPERATURE, targets, reduction="none")


def _compiled_chunks(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """torch.compile of a chunk, recomputed backward: what one writes without a kernel."""
    parts = []
    for rows, ids in zip(hidden.split(COMPILED_ROWS), targets.split(COMPILED_ROWS), strict=True):
        parts.append(torch.utils.checkpoint.checkpoint(_compiled_eager, rows, weight, ids, use_reentrant=False))
    return torch.cat(parts)


_compiled_eager = torch.compile(_eager, dynamic=True)


def _fixed_split() -> Head:
    from fixed_split import fixed_split

    return Head(lambda hidden, weight, targets: fixed_split(hidden, weight, targets, TEMPERATURE)[0])


def _cce() -> Head:
    from cut_cross_entropy import linear_cross_entropy

    def logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return -linear_cross_entropy(hidden, weight, targets, reduction="none", impl="cce", filter_eps=None)

    return Head(logprobs)


def _liger() -> Head:
    """Forms gradients in its forward pass, so only a plain mean can be trained with it."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        found = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "none")
        return -(found[0] if isinstance(found, tuple) else found)

    return Head(logprobs, differentiable=False)


def _liger_cute() -> Head:
    """Its CuTe-DSL form with a temperature and per-token results; needs nvidia-cutlass-dsl."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        found = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)
        return -(found[0] if isinstance(found, tuple) else found)

    return Head(logprobs)
