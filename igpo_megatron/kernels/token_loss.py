"""`linear_logprob` for a loss on tokens: gradients are formed in the forward pass, by 6NHv operations in all instead of 8NHv.

The gradient of such a loss at a token depends only on its own log-prob and entropy and on constants, so a block of rows is done at once:

    block of hidden [b, H] ──> logits [b, v] ──> record [b, 4] ──one all-gather──> logp, entropy ──the loss──> g, h [b]
                               logits, g, h ──> dz [b, v] ──> grad_hidden[block] = dz . weight,   grad_weight += dz^T . hidden[block]

chunk by chunk of columns, so that a GPU folds logits and multiplies dz while they are in L2. Backward only returns what was computed.
Formulas are in torch_chunked.

Memory beyond the gradients that any head returns: a block's logits (`workspace`), dz of one chunk, and grad_weight in fp32, 4vH bytes. It
and grad_hidden exist from the forward pass to the backward pass, which comes next on the last stage.
Every block reads and writes grad_weight, 8vH bytes for 6bHv operations, so a GPU needs blocks of about 1,000 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from igpo_megatron.kernels import torch_chunked
from igpo_megatron.kernels.linear_logprob import WORKSPACE, Implementation, check_inputs, local_targets, merge, resolve, valid_columns
from igpo_megatron.kernels.torch_chunked import accumulate, accumulator, empty_records, fold, matmul, products_of, widened

Upstream = Callable[[slice, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(which of the N targets, their logp [b], their entropy [b]) -> the loss's derivatives by these, (g [b], h [b])."""

COLUMNS = 8192
"""Of a chunk: fp32 logits of 1,024 rows are 32 MiB."""


def linear_logprob_with_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    upstream: Upstream,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    need_entropy: bool = True,
    implementation: Implementation = "auto",
    workspace: int = WORKSPACE,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logp [N], entropy [N], carrier): the values of `linear_logprob` without a gradient, and a 0 that carries the loss's.

    The derivative of `carrier` by hidden states and weight is that of the loss whose `upstream` is given, so `loss.detach() + carrier` has
    the loss's value and its gradient, and may be scaled. It can be sent back once.

    Args:
        hidden: [N, H], a row for each target.
        targets: as in `linear_logprob`; ignored ones get zeros, and their g and h do not count.
        upstream: called once per block, in order, on every rank of `tp_group` with the same numbers.
        workspace: bytes of fp32 logits at a time; at least one row's.

    The others as in `linear_logprob`, but shards have the same number of rows on every rank: they decide how many all-gathers there are.
    """
    check_inputs(hidden, weight, targets, temperature)
    call = _Call(
        upstream=upstream,
        shard=_shard(implementation, hidden.device),
        vocab_start=vocab_start,
        valid=valid_columns(weight, vocab_start, vocab_size),
        temperature=float(temperature),
        tp_group=tp_group,
        need_entropy=need_entropy,
        rows=max(1, workspace // (4 * len(weight))),
    )
    with products_of(hidden):
        return _WithGradients.apply(hidden, weight, targets, call)


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments that are no tensors."""

    upstream: Upstream
    shard: ModuleType
    """torch_chunked or triton_head."""

    vocab_start: int
    valid: int
    temperature: float
    tp_group: dist.ProcessGroup | None
    need_entropy: bool
    rows: int
    """Of a block, at most."""


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, call: _Call
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        exact = accumulator(hidden.dtype)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if need_weight else None
        found = hidden.new_zeros((2, len(hidden)), dtype=exact)
        local, ignored = local_targets(targets, call.vocab_start, call.valid), targets < 0
        used = widened(weight[: call.valid])
        columns = [slice(start, min(start + COLUMNS, call.valid)) for start in range(0, call.valid, COLUMNS)]
        for block in _blocks(len(hidden), call.rows):
            rows = widened(hidden[block])
            picks = [local_targets(local[block], part.start, part.stop - part.start) for part in columns]
            logits, records = [], [empty_records(rows)]
            for part, picked in zip(columns, picks, strict=True):
                logits.append(matmul(rows, used[part].t()))
                records.append(call.shard.block_records(logits[-1], picked, call.temperature, call.need_entropy))
            logp, entropy, lse = merge(fold(torch.stack(records)), call.need_entropy, call.tp_group)
            found[:, block] = torch.stack((logp, entropy)).masked_fill(ignored[block], 0.0)
            if not (need_hidden or need_weight):
                continue
            g, h = (slope.masked_fill(ignored[block], 0.0) for slope in call.upstream(block, *found[:, block]))
            if not call.need_entropy:
                h = torch.zeros_like(h)
            coefficients = torch.stack((lse, g, -g - h * entropy, h), -1)
            grad_rows = torch.zeros_like(rows, dtype=exact)
            for part, picked, chunk in zip(columns, picks, logits, strict=True):
                dz = call.shard.block_dz(chunk, picked, call.temperature, coefficients, rows.dtype)
                if grad_hidden is not None:
                    accumulate(grad_rows, dz, used[part])
                if grad_weight is not None:
                    accumulate(grad_weight[part], dz.t(), rows)
            if grad_hidden is not None:
                grad_hidden[block] = grad_rows
        ctx.gradients = grad_hidden, grad_weight, weight.dtype
        logp, entropy = found.unbind()
        ctx.mark_non_differentiable(logp, entropy)
        ctx.set_materialize_grads(False)
        return logp, entropy, found.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this forward pass were already returned; backward can run only once")
        (grad_hidden, grad_weight, dtype), ctx.gradients = ctx.gradients, None
        scale = grads[-1]
        if scale is None:
            return None, None, None, None
        if grad_hidden is not None:
            grad_hidden.mul_(scale)
        if grad_weight is not None:
            # Scaled and rounded in one pass over the largest tensor there is.
            out = grad_weight if dtype == grad_weight.dtype else torch.empty_like(grad_weight, dtype=dtype)
            grad_weight = torch.mul(grad_weight, scale, out=out)
        return grad_hidden, grad_weight, None, None


def _shard(implementation: Implementation, device: torch.device) -> ModuleType:
    if resolve(implementation, device) == "torch":
        return torch_chunked
    from igpo_megatron.kernels import triton_head

    return triton_head


def _blocks(rows: int, most: int) -> list[slice]:
    """As few as `most` rows allow, of about the same size."""
    count = -(-rows // most)
    size = -(-rows // count) if count else 0
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size or 1)]
