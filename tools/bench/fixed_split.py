"""The scheme that Megatron RL stacks use for log-probs, re-implemented as a peer: vocabulary split every 1024 columns, whatever N is.

Forward: a program owns 128 rows and one split, so `hidden` is read once per split and the scratch is [N, splits, 3] fp32.
Backward: a kernel writes bf16 dlogits of 9504 columns at a time, and two GEMMs take them to dH and dW in the inputs' dtype.
Tile sizes are the published ones (128 x 256 x 32, 8 warps, 3 stages). One rank, temperature and entropy as ours.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

SPLIT, GRADIENT_SPLIT = 1024, 9504
TILE = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}


@triton.jit
def _tile_logits(
    hidden, weight, row, column, rows, vocab, scale, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, H, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        a = tl.load(hidden + row[:, None].to(tl.int64) * H + inner[None, :], mask=(row[:, None] < rows) & (inner[None, :] < H), other=0.0)
        b = tl.load(
            weight + column[None, :].to(tl.int64) * H + inner[:, None], mask=(column[None, :] < vocab) & (inner[:, None] < H), other=0.0
        )
        logits = tl.dot(a, b, logits)
    return logits * scale


@triton.jit
def _forward(
    hidden,
    weight,
    targets,
    records,
    picked,
    rows,
    vocab,
    splits,
    scale,
    H: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    target = tl.load(targets + row, mask=row < rows, other=-1)
    top = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    product = tl.zeros((BLOCK_M,), tl.float32)
    for tile in range(0, SPLIT // BLOCK_N):
        column = split * SPLIT + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        z = _tile_logits(hidden, weight, row, column, rows, vocab, scale, H, BLOCK_M, BLOCK_N, BLOCK_K)
        z = tl.where(column[None, :] < vocab, z, -1e30)
        here = column[None, :] == target[:, None]
        found = tl.sum(tl.where(here, z, 0.0), 1)
        tl.store(picked + row, found, mask=(row < rows) & (tl.sum(here.to(tl.int32), 1) > 0))
        new_top = tl.maximum(top, tl.max(z, 1))
        p = tl.exp(z - new_top[:, None])
        rescale = tl.exp(top - new_top)
        total = total * rescale + tl.sum(p, 1)
        product = product * rescale + tl.sum(p * z, 1)
        top = new_top
    at = records + (row.to(tl.int64) * splits + split) * 3
    tl.store(at, top, mask=row < rows)
    tl.store(at + 1, total, mask=row < rows)
    tl.store(at + 2, product, mask=row < rows)


@triton.jit
def _dlogits(
    hidden,
    weight,
    targets,
    lse,
    entropy,
    g,
    h,
    out,
    rows,
    vocab,
    first,
    width,
    scale,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offset = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = first + offset
    z = _tile_logits(hidden, weight, row, column, rows, vocab, scale, H, BLOCK_M, BLOCK_N, BLOCK_K)
    inside = row < rows
    log_p = z - tl.load(lse + row, mask=inside, other=0.0)[:, None]
    up, up_entropy = tl.load(g + row, mask=inside, other=0.0), tl.load(h + row, mask=inside, other=0.0)
    target = tl.load(targets + row, mask=inside, other=-1)
    slope = -up[:, None] - up_entropy[:, None] * (log_p + tl.load(entropy + row, mask=inside, other=0.0)[:, None])
    d = tl.exp(log_p) * slope + tl.where(column[None, :] == target[:, None], up[:, None], 0.0)
    mask = inside[:, None] & (offset[None, :] < width) & (column[None, :] < vocab)
    tl.store(out + row[:, None].to(tl.int64) * width + offset[None, :], (d * scale).to(out.dtype.element_ty), mask=mask)


class _FixedSplit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, ...]:
        rows, vocab = len(hidden), len(weight)
        splits = triton.cdiv(vocab, SPLIT)
        records = torch.empty((rows, splits, 3), device=hidden.device)
        picked = torch.zeros(rows, device=hidden.device)
        grid = (triton.cdiv(rows, TILE["BLOCK_M"]), splits)
        _forward[grid](
            hidden, weight, targets, records, picked, rows, vocab, splits, 1 / temperature, H=hidden.shape[1], SPLIT=SPLIT, **TILE
        )
        tops, sums, products = records.unbind(-1)
        top = tops.amax(1)
        scale = (tops - top[:, None]).exp()
        total = (sums * scale).sum(1)
        lse = top + total.log()
        entropy = lse - (products * scale).sum(1) / total
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.temperature = temperature
        return picked - lse, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        g, h = (grad.contiguous() for grad in grads)
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.empty_like(weight)
        for first in range(0, len(weight), GRADIENT_SPLIT):
            part = weight[first : first + GRADIENT_SPLIT]
            d = torch.empty((len(hidden), len(part)), device=hidden.device, dtype=hidden.dtype)
            grid = (triton.cdiv(len(hidden), TILE["BLOCK_M"]), triton.cdiv(len(part), TILE["BLOCK_N"]))
            sizes = (len(hidden), len(weight), first, len(part), 1 / ctx.temperature)
            _dlogits[grid](hidden, weight, targets, lse, entropy, g, h, d, *sizes, H=hidden.shape[1], **TILE)
            grad_hidden += d @ part
            grad_weight[first : first + GRADIENT_SPLIT] = d.t() @ hidden
        return grad_hidden, grad_weight, None, None


def fixed_split(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [N, H], weight [V, H], targets [N] -> log-prob and entropy, each [N] fp32."""
    logp, entropy = _FixedSplit.apply(hidden.contiguous(), weight, targets, temperature)
    return logp, entropy
