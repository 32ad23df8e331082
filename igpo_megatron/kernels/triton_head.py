"""One vocabulary shard of `linear_logprob` in Triton; formulas, arguments and the torch twin are in torch_chunked.

Forward has the forms of triton_stream, which never write logits, and

    chunks   cuBLAS writes a chunk of fp32 logits that stays in L2, one kernel folds it into the record:  chunk by chunk [N, 4]

`linear_logprob.choose_form` says which one runs. Backward is shared: cuBLAS recomputes a chunk of logits, a kernel turns it into dz, cuBLAS
adds dz to both gradients in fp32. For low-precision inputs dz is rounded to their dtype before it is multiplied, as in every linear layer.
No atomics: folds happen in the order of the columns.

Estimates for an H100 at 4,096 rows and H = 3584 (nothing is measured): chunks 0.75-0.8 of the matmul ceiling forward. Backward reads and
writes `grad_hidden` in fp32 once per column chunk: 0.12 GB, 4 % of the time of the chunk's three matmuls at 8,192 columns, 16 % at 2,048.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl

from igpo_megatron.kernels import triton_stream
from igpo_megatron.kernels.torch_chunked import Shard, accumulate, empty_records, matmul
from igpo_megatron.kernels.triton_stream import MASKED

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

ROW_BLOCK = 4096
"""Rows of a backward chunk at most: with the default workspace it has 8,192 columns."""

FORWARD_ROWS, FORWARD_BYTES = 1024, 32 * 2**20
"""Largest forward chunk: with 8,192 columns it is full, its GEMM is about two waves of an H100, and its logits are folded from L2."""

FOLD = {"BLOCK_R": 1, "BLOCK": 2048, "num_warps": 1}
"""Tile of the kernel that folds a chunk: each row has one warp, which waits for no other and has loads of 8 KB in flight."""

BLOCK = {"BLOCK_R": 4, "BLOCK": 512}
"""Tile of the kernel that turns logits into dz."""


@triton.jit(do_not_specialize=["rows", "first"])
def _fold_chunk(
    logits,  # [n, width] fp32, hidden . weight^T of columns first .. first + width
    targets,  # [n] int64
    record,  # [n, 4] fp32
    rows,  # n
    width,
    first,
    inverse_temperature,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """A chunk of logits into its rows' records."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    at = record + row * 4
    top = tl.maximum(tl.load(at, mask=inside, other=0.0), MASKED)
    total = tl.load(at + 1, mask=inside, other=0.0)
    product = tl.load(at + 2, mask=inside, other=0.0)
    picked = tl.load(at + 3, mask=inside, other=0.0)
    target = tl.load(targets + row, mask=inside, other=-1) - first
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = inside[:, None] & (column[None, :] < width)
        z = tl.load(logits + row.to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0.0) * inverse_temperature
        z = tl.where(mask, z, MASKED)
        picked = tl.maximum(picked, tl.max(tl.where(mask & (column[None, :] == target[:, None]), z, float("-inf")), 1))
        new_top = tl.maximum(top, tl.max(z, 1))
        shift = top - new_top
        rescale = tl.exp(shift)
        z -= new_top[:, None]
        p = tl.exp(z)
        if ENTROPY:
            product = (product + total * shift) * rescale + tl.sum(p * z, 1)
        total = total * rescale + tl.sum(p, 1)
        top = new_top
    tl.store(at, top, mask=inside)
    tl.store(at + 1, total, mask=inside)
    tl.store(at + 2, product, mask=inside)
    tl.store(at + 3, picked, mask=inside)


@triton.jit(do_not_specialize=["rows", "first"])
def _logits_to_dz(
    logits,  # [n, width] fp32
    dz,  # [n, width], `logits` itself or a buffer of the inputs' dtype
    targets,  # [n] int64
    coefficients,  # [n, 4] fp32: lse, g, a, h
    rows,  # n
    width,
    first,
    inverse_temperature,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    mask = inside[:, None] & (column[None, :] < width)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    lse = tl.load(coefficients + row * 4, mask=inside, other=0.0)
    g = tl.load(coefficients + row * 4 + 1, mask=inside, other=0.0)
    a = tl.load(coefficients + row * 4 + 2, mask=inside, other=0.0)
    h = tl.load(coefficients + row * 4 + 3, mask=inside, other=0.0)
    target = tl.load(targets + row, mask=inside, other=-1) - first
    log_p = tl.load(logits + at, mask=mask, other=0.0) * inverse_temperature - lse[:, None]
    slope = tl.exp(log_p) * (a[:, None] - h[:, None] * log_p) + tl.where(column[None, :] == target[:, None], g[:, None], 0.0)
    tl.store(dz + at, (slope * inverse_temperature).to(dz.dtype.element_ty), mask=mask)


def chunked_partials(shard: Shard, need_entropy: bool) -> torch.Tensor:
    """`torch_chunked.partials` by GEMMs into chunks of FORWARD_BYTES or `workspace` bytes, whichever is less."""
    hidden, valid = shard.hidden, shard.valid
    record = empty_records(hidden)
    shape = _chunk_shape(len(hidden), valid, FORWARD_ROWS, min(shard.workspace, FORWARD_BYTES))
    buffer = hidden.new_empty(math.prod(shape), dtype=torch.float32)
    for rows, columns in _chunks(len(hidden), valid, shape):
        logits = _matmul_into(buffer, hidden[rows], shard.weight[columns].t())
        _fold(logits, shard.targets[rows], record[rows], columns.start, shard.temperature, need_entropy)
    return record


FORWARDS: dict[str, Callable[..., torch.Tensor]] = {
    **{form: partial(triton_stream.partials, form) for form in ("fused", "tma", "specialised")},
    "chunks": chunked_partials,
}
"""Form -> `torch_chunked.partials`."""


def gradients(
    shard: Shard, coefficients: torch.Tensor, need_hidden: bool, need_weight: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`torch_chunked.gradients`, chunk by chunk of columns, so that a chunk of the weight's gradient is written once.

    Beside the `workspace` bytes of logits there are dz (in 16 bits half of that) and, where there are several blocks of rows, this chunk of
    the weight's gradient in fp32. A single block is written as it is summed: with few rows, one chunk may hold all columns.
    """
    hidden, weight, valid = shard.hidden, shard.weight, shard.valid
    grad_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if need_hidden else None
    grad_weight = torch.empty_like(weight) if need_weight else None
    if grad_weight is not None:
        grad_weight[valid if len(hidden) else 0 :] = 0.0
    shape = _chunk_shape(len(hidden), valid, ROW_BLOCK, shard.workspace)
    buffer = hidden.new_empty(math.prod(shape), dtype=torch.float32)
    narrow = None if hidden.dtype == torch.float32 else hidden.new_empty(math.prod(shape))
    chunk: torch.Tensor | None = None
    for rows, columns in _chunks(len(hidden), valid, shape):
        logits = _matmul_into(buffer, hidden[rows], weight[columns].t())
        count = len(logits)
        dz = logits if narrow is None else narrow[: logits.numel()].view(logits.shape)
        _to_dz(logits, dz, shard.targets[rows], coefficients[rows], columns.start, shard.temperature)
        if grad_hidden is not None:
            accumulate(grad_hidden[rows], dz, weight[columns])
        if grad_weight is not None and count == len(hidden):
            torch.mm(dz.t(), hidden, out=grad_weight[columns])
        elif grad_weight is not None:
            if rows.start == 0:
                chunk = matmul(dz.t(), hidden[rows])
            else:
                assert chunk is not None, "row blocks of a column chunk come in order"
                accumulate(chunk, dz.t(), hidden[rows])
            if rows.stop == len(hidden):
                grad_weight[columns] = chunk
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight


def block_records(logits: torch.Tensor, local_targets: torch.Tensor, temperature: float, need_entropy: bool) -> torch.Tensor:
    """`torch_chunked.block_records`."""
    record = empty_records(logits)
    _fold(logits, local_targets, record, 0, temperature, need_entropy)
    return record


def _fold(logits: torch.Tensor, targets: torch.Tensor, record: torch.Tensor, first: int, temperature: float, entropy: bool) -> None:
    count, width = logits.shape
    grid = (triton.cdiv(count, FOLD["BLOCK_R"]),)
    _fold_chunk[grid](logits, targets, record, count, width, first, 1.0 / temperature, ENTROPY=entropy, **FOLD)


def block_dz(
    logits: torch.Tensor, local_targets: torch.Tensor, temperature: float, coefficients: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`torch_chunked.block_dz`; in place where `dtype` is that of the logits."""
    dz = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    _to_dz(logits, dz, local_targets, coefficients, 0, temperature)
    return dz


def _to_dz(
    logits: torch.Tensor, dz: torch.Tensor, targets: torch.Tensor, coefficients: torch.Tensor, first: int, temperature: float
) -> None:
    count, width = logits.shape
    grid = (triton.cdiv(count, BLOCK["BLOCK_R"]), triton.cdiv(width, BLOCK["BLOCK"]))
    _logits_to_dz[grid](logits, dz, targets, coefficients, count, width, first, 1.0 / temperature, **BLOCK)


def _chunk_shape(rows: int, valid: int, row_block: int, size: int) -> tuple[int, int]:
    """(rows, columns) of a chunk: at most `size` bytes of fp32, columns a multiple of 128 unless they are all."""
    block = min(rows, row_block, max(1, size // (4 * 128)))
    columns = max(128, size // (4 * max(block, 1)) // 128 * 128)
    return block, min(columns, valid)


def _chunks(rows: int, valid: int, shape: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Column chunks in order, and within one the row blocks in order."""
    block, columns = shape
    for first in range(0, valid if rows else 0, max(columns, 1)):
        for row in range(0, rows, block):
            yield slice(row, min(row + block, rows)), slice(first, min(first + columns, valid))


def _matmul_into(workspace: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in the front of the fp32 workspace, contiguous."""
    out = workspace[: len(a) * b.shape[1]].view(len(a), b.shape[1])
    return matmul(a, b, out=out)
