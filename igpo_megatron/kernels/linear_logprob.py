"""Log-probability of chosen tokens straight from hidden states: hidden x weight -> log-prob, entropy, never an [N, V] tensor.

With logits z = hidden . weight^T / temperature, each rank reduces its vocabulary shard, chunk by chunk of rows, to four numbers
per row; one all-gather of that [N, 4] record merges the shards:

    m = max z,  s = sum exp(z - m),  u = sum z exp(z - m),  t = z[target] (0 where the target lives elsewhere)
    M = max m_r,  S = sum s_r exp(m_r - M)
    lse = M + log S      logp = sum t_r - lse      entropy = lse - (sum u_r exp(m_r - M)) / S

Backward recomputes z exactly. With p = exp(z - lse) and upstream gradients g (logp), h (entropy), e (lse):

    dz = (g (1[target] - p) + e p - h p (z - lse + entropy)) / temperature
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

CHUNK_BYTES = 32 * 2**20
"""Workspace for one chunk of fp32 logits."""


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    rows: torch.Tensor | None = None,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-prob of each target, entropy of its distribution and log-sum-exp of its logits.

    Args:
        hidden: [M, H]; the same on every rank of `tp_group`.
        weight: [v, H], this rank's vocabulary rows; gradients accumulate in its dtype.
        targets: [N] int64, global token ids.
        rows: [N] int64, row of `hidden` that predicts each target, repeats allowed; None means N = M in order.
        vocab_start: global id of `weight[0]`.
        vocab_size: number of real tokens; columns from there on are padding and count as -inf. None: no padding.
        temperature: logits are divided by it, > 0.
        tp_group: ranks that share the vocabulary; None for one rank.

    Returns:
        (logp, entropy, lse), each [N] fp32, in nats.

    The gradient of `hidden` holds this rank's vocabulary shard only: the caller sums it over `tp_group`, as every
    column-parallel layer's caller does.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: expected a positive number")
    if rows is not None:
        hidden = hidden.index_select(0, rows)
    if len(hidden) != len(targets):
        raise ValueError(f"{len(hidden)} rows of hidden states for {len(targets)} targets")
    valid = weight.shape[0]
    if vocab_size is not None:
        valid = max(0, min(valid, vocab_size - vocab_start))
    return _LinearLogprob.apply(hidden, weight, targets, vocab_start, valid, temperature, tp_group)


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    """[n, v] fp32; products of low-precision inputs are accumulated and kept in fp32."""
    if hidden.dtype == torch.float32:
        logits = hidden @ weight.t()
    elif hidden.is_cuda:
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        logits = hidden.float() @ weight.float().t()
    return logits.div_(temperature)


class _LinearLogprob(torch.autograd.Function):
    """Row-chunked torch implementation; the reference of every faster one."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        vocab_start: int,
        valid: int,
        temperature: float,
        tp_group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        record = hidden.new_zeros((len(targets), 4), dtype=torch.float32)
        record[:, 0] = -torch.inf
        local = targets - vocab_start
        here = (local >= 0) & (local < valid)
        if valid:
            for part in _chunks(len(targets), valid):
                z = _logits(hidden[part], weight[:valid], temperature)
                top = z.amax(-1)
                exp = (z - top[:, None]).exp_()
                record[part, 0] = top
                record[part, 1] = exp.sum(-1)
                record[part, 2] = (exp * z).sum(-1)
                picked = z.gather(-1, local[part].clamp(0, valid - 1)[:, None])[:, 0]
                record[part, 3] = torch.where(here[part], picked, 0.0)
        records = _all_gather(record, tp_group)
        top = records[..., 0].amax(0)
        scale = (records[..., 0] - top).exp()
        total = (records[..., 1] * scale).sum(0)
        lse = top + total.log()
        logp = records[..., 3].sum(0) - lse
        entropy = lse - (records[..., 2] * scale).sum(0) / total
        ctx.save_for_backward(hidden, weight, local, here, lse, entropy)
        ctx.valid, ctx.temperature = valid, temperature
        return logp, entropy, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_logp, grad_entropy, grad_lse = grads
        hidden, weight, local, here, lse, entropy = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        if ctx.valid:
            used = weight[: ctx.valid]
            for part in _chunks(len(local), ctx.valid):
                z = _logits(hidden[part], used, ctx.temperature)
                log_p = z.sub_(lse[part, None])
                p = log_p.exp()
                slope = grad_lse[part, None] - grad_logp[part, None] - grad_entropy[part, None] * (log_p + entropy[part, None])
                dz = p.mul_(slope)
                at = here[part].nonzero()[:, 0]
                dz[at, local[part][at]] += grad_logp[part][at]
                dz.div_(ctx.temperature)
                grad_hidden[part] = (dz @ used.float()).to(hidden.dtype)
                grad_weight[: ctx.valid].addmm_(dz.t(), hidden[part].float())
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def _chunks(rows: int, columns: int) -> list[slice]:
    size = max(1, CHUNK_BYTES // (4 * columns))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _all_gather(record: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[ranks, N, 4]"""
    if group is None or group.size() == 1:
        return record[None]
    parts = [torch.empty_like(record) for _ in range(group.size())]
    dist.all_gather(parts, record, group=group)
    return torch.stack(parts)
