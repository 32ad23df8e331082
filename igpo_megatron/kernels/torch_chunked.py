"""One vocabulary shard of `linear_logprob` in plain torch: the reference of every faster implementation, and the CPU's.

With logits z = hidden . weight^T / temperature over the shard's valid columns, a row is reduced to a record of four numbers,

    m = max z    s = sum exp(z - m)    u = sum (z - m) exp(z - m)    t = z[target], -inf where the target is not in this shard

and records of disjoint columns fold into one (u is taken relative to m, so a large |z| costs the entropy no digits):

    M = max m_r    S = sum s_r exp(m_r - M)    U = sum (u_r + s_r (m_r - M)) exp(m_r - M)    T = max t_r

Backward recomputes z. With upstream gradients g of logp, h of the entropy, e of lse and log p = z - lse,

    dz = (g 1[target] + p (a - h log p)) / temperature,    a = e - g - h entropy
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

CHUNK_BYTES = 16 * 2**20
"""Largest chunk of logits on CPU; larger ones do not fit the caches. Two are alive at a time."""

CHUNK_COLUMNS = 8192
"""Most columns of a chunk on CPU: 512 rows by 8192 columns multiply twice as fast as 85 rows by 49,152, which are as many bytes."""


@dataclass(frozen=True, slots=True)
class Shard:
    """N targets and one rank's rows of the vocabulary."""

    hidden: torch.Tensor
    """[N, H]"""

    weight: torch.Tensor
    """[v, H], the same dtype."""

    targets: torch.Tensor
    """[N] int64, row of `weight`; -1 where the target is not in this shard."""

    valid: int
    """Number of leading rows of `weight` that are tokens; the others count as -inf."""

    temperature: float
    """Logits are divided by it."""

    workspace: int
    """Bytes of one chunk of logits at most (on CPU also CHUNK_BYTES), at least one row's; two are alive at a time."""


def partials(shard: Shard, need_entropy: bool) -> torch.Tensor:
    """Record (m, s, u, t) of this shard for every row, [N, 4] in `accumulator(hidden.dtype)`, nats; without `need_entropy` u is 0."""
    hidden, valid = shard.hidden, shard.valid
    record = empty_records(hidden)
    if not valid:
        return record
    parts, columns = _chunks(hidden, valid, shard.workspace)
    rows = widened(hidden)
    found: list[list[torch.Tensor]] = [[] for _ in parts]
    with products_of(hidden):
        for block in columns:
            used = widened(shard.weight[block])
            for records, part in zip(found, parts, strict=True):
                z = _divided(matmul(rows[part], used.t()), shard.temperature)
                records.append(_records(z, _within(shard.targets[part], block), need_entropy))
    for records, part in zip(found, parts, strict=True):
        record[part] = fold(torch.stack(records))
    return record


def gradients(
    shard: Shard, coefficients: torch.Tensor, need_hidden: bool, need_weight: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """This shard's part of the gradient of `hidden` [N, H], and the gradient of `weight` [v, H]; None where not needed.

    `coefficients` [N, 4]: per row (lse, g, a, h) of the formula above. Both are accumulated in fp32 and returned in the inputs' dtype.
    """
    hidden, weight, valid, exact = shard.hidden, shard.weight, shard.valid, accumulator(shard.hidden.dtype)
    grad_hidden = torch.zeros_like(hidden, dtype=exact) if need_hidden else None
    grad_weight = torch.zeros_like(weight) if need_weight else None
    parts, columns = _chunks(hidden, valid, shard.workspace)
    rows = widened(hidden)
    with products_of(hidden):
        for block in columns:
            used = widened(weight[block])
            grad_block = torch.zeros_like(used, dtype=exact) if need_weight else None
            for part in parts:
                z = _divided(matmul(rows[part], used.t()), shard.temperature)
                slopes = _slopes(z, _within(shard.targets[part], block), coefficients[part])
                dz = _divided(slopes, shard.temperature).to(rows.dtype)
                if grad_hidden is not None:
                    accumulate(grad_hidden[part], dz, used)
                if grad_block is not None:
                    accumulate(grad_block, dz.t(), rows[part])
            if grad_weight is not None and grad_block is not None:
                grad_weight[block] = grad_block
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight


def block_records(logits: torch.Tensor, local_targets: torch.Tensor, temperature: float, need_entropy: bool) -> torch.Tensor:
    """`partials` of rows whose logits are at hand: hidden . weight^T [n, valid], left as they are -> [n, 4]."""
    return _records(logits / temperature, local_targets, need_entropy)


def block_dz(
    logits: torch.Tensor, local_targets: torch.Tensor, temperature: float, coefficients: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """dz / temperature of the same logits, which are used up: [n, valid] in `dtype`; `coefficients` as in `gradients`."""
    return _divided(_slopes(_divided(logits, temperature), local_targets, coefficients), temperature).to(dtype)


def fold(records: torch.Tensor) -> torch.Tensor:
    """Records of disjoint columns, [R, N, 4], as one record [N, 4]; an empty one is (-inf, 0, 0, -inf)."""
    if len(records) == 1:
        return records[0]  # the lines below would change nothing, with thirteen kernels on a GPU
    tops, sums, products, picked = records.unbind(-1)
    top = tops.amax(0)
    shift = torch.where(sums > 0, tops - top, 0.0)
    scale = shift.exp()
    return torch.stack((top, (sums * scale).sum(0), ((products + sums * shift) * scale).sum(0), picked.amax(0)), -1)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """fp32 for everything but fp64, which only tests use."""
    return torch.promote_types(dtype, torch.float32)


def empty_records(hidden: torch.Tensor) -> torch.Tensor:
    """[N, 4], the records of a shard without columns."""
    record = hidden.new_zeros((len(hidden), 4), dtype=accumulator(hidden.dtype))
    record[:, ::3] = -torch.inf
    return record


def matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b accumulated and returned in fp32 (fp64 for fp64)."""
    if a.dtype == accumulator(a.dtype):
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out) if out is not None else torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float(), out=out)


def accumulate(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, with `total` in fp32 (fp64 for fp64)."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _records(z: torch.Tensor, local_targets: torch.Tensor, need_entropy: bool) -> torch.Tensor:
    """(m, s, u, t) of rows with logits z [n, valid], which are overwritten."""
    picked = z.gather(-1, local_targets.clamp(min=0)[:, None])[:, 0]
    top = z.amax(-1)
    exp = z.sub_(top[:, None]).exp()
    total = exp.sum(-1)
    product = exp.mul_(z).sum(-1) if need_entropy else torch.zeros_like(total)
    return torch.stack((top, total, product, torch.where(local_targets >= 0, picked, -torch.inf)), -1)


def _slopes(z: torch.Tensor, local_targets: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """dL / dz [n, valid] of rows with logits z, which are overwritten."""
    lse, g, a, h = coefficients.unbind(-1)
    log_p = z.sub_(lse[:, None])
    p = log_p.exp()
    slopes = p.mul_(log_p.mul_(-h[:, None]).add_(a[:, None]))
    return slopes.scatter_add_(-1, local_targets.clamp(min=0)[:, None], torch.where(local_targets >= 0, g, 0.0)[:, None])


def _divided(numbers: torch.Tensor, temperature: float) -> torch.Tensor:
    """numbers / temperature in place, without a pass over them for the usual 1."""
    return numbers if temperature == 1 else numbers.div_(temperature)


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """On CPU low precision is widened once, not chunk by chunk; CUDA multiplies it as it is and accumulates in fp32."""
    return tensor if tensor.is_cuda else tensor.to(accumulator(tensor.dtype))


@contextmanager
def products_of(hidden: torch.Tensor) -> Iterator[None]:
    """Inside, fp32 products on CPU may run on the processor's bf16 units where `hidden` is bf16: sums and results stay fp32.

    Of widened bf16 numbers such a product is exact. An fp32 factor, which is only ever dz, is rounded to bf16, as in every linear layer.
    torch has no bf16 product with an fp32 result on CPU: this switch of oneDNN's is the way to it. Without such units it changes nothing.
    It holds for the process.
    """
    matmuls = getattr(torch.backends.mkldnn, "matmul", None)
    if hidden.dtype != torch.bfloat16 or hidden.is_cuda or matmuls is None:  # torch before 2.9 has no such switch
        yield
        return
    before = matmuls.fp32_precision
    matmuls.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmuls.fp32_precision = before


def _chunks(hidden: torch.Tensor, valid: int, workspace: int) -> tuple[list[slice], list[slice]]:
    """Parts of the rows, and blocks of the columns: all columns on CUDA, where `workspace` is large, and few enough for caches on CPU.

    A block of the weight is widened once for all parts; the whole weight in fp32 would be memory that the system clears first.
    """
    wide = valid if hidden.is_cuda else min(valid, CHUNK_COLUMNS)
    size = max(1, (workspace if hidden.is_cuda else min(workspace, CHUNK_BYTES)) // (4 * max(wide, 1)))
    parts = [slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size)]
    return parts, [slice(start, min(start + wide, valid)) for start in range(0, valid, max(wide, 1))]


def _within(targets: torch.Tensor, columns: slice) -> torch.Tensor:
    """Columns [n] of the shard as columns of this part of it, -1 where they are not in it."""
    return torch.where((targets >= columns.start) & (targets < columns.stop), targets - columns.start, -1)
